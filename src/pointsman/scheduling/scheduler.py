"""The configured plugins put together: which profile runs, and who is told of dispatches and outcomes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pointsman.errors import PreconditionFailed, Saturated
from pointsman.predictor.learned import Learned
from pointsman.predictor.state import State
from pointsman.registry import Plugin
from pointsman.scheduling.cycle import Cycle, Services
from pointsman.scheduling.interfaces import (
    Admitter,
    DispatchObserver,
    Keeper,
    Learner,
    OutcomeObserver,
    Preparing,
    ProfileHandler,
    SaturationDetector,
    Watcher,
)
from pointsman.scheduling.profile import Profile
from pointsman.types import Decision, Endpoint, InferenceRequest, Outcome

IF_AVAILABLE = "if-available"


class Scheduler:
    """Runs one profile per request. ``plugins`` are all configured plugins, each once, in configuration
    order.
    """

    def __init__(
        self,
        profiles: Sequence[Profile],
        services: Services,
        *,
        handler: ProfileHandler | None = None,
        plugins: Sequence[Plugin] = (),
        detector: SaturationDetector | None = None,
    ) -> None:
        assert profiles, "a scheduler needs a profile"
        self.profiles = {profile.name: profile for profile in profiles}
        self._names = tuple(self.profiles)
        self._only = profiles[0] if len(profiles) == 1 else None
        self._handler = handler
        self._detector = detector
        self.services = services
        self.plugins = tuple(plugins)
        self._admitters = [p for p in plugins if isinstance(p, Admitter)]
        self._dispatch = [p for p in plugins if isinstance(p, DispatchObserver)]
        self._watchers = [p for p in plugins if isinstance(p, Watcher)]
        self._learners = [p for p in plugins if isinstance(p, Learner)]
        self._keepers = [p for p in plugins if isinstance(p, Keeper)]
        self._outcome = [p for p in plugins if isinstance(p, OutcomeObserver)]
        for plugin in plugins:
            if isinstance(plugin, Preparing):
                plugin.prepare(services)

    def saturation(self, endpoints: Sequence[Endpoint]) -> float:
        """How full these endpoints are; 1.0 and more is too full for what can wait. 0 without a detector."""
        if self._detector is None:
            return 0.0
        return self._detector.saturation(endpoints, self.services.clock())

    def watch(self, endpoints: Sequence[Endpoint]) -> None:
        """Let the policy look at what endpoints (not empty) say; some times a second while they are busy."""
        for watcher in self._watchers:
            watcher.watch(endpoints, self.services.clock())

    def learned(self, endpoints: Sequence[Endpoint]) -> Mapping[str, Learned]:
        """What the policy knows of these endpoints, by name; nothing where it learns nothing."""
        found: dict[str, Learned] = {}
        for learner in self._learners:
            found.update(learner.learned(endpoints, self.services.clock()))
        return found

    def state(self, endpoints: Sequence[Endpoint], wall_s: float) -> State | None:
        """What the policy knows of these endpoints and of answers, to be kept over a restart; None where it
        knows nothing yet or never does. ``wall_s`` is now in seconds since 1970.
        """
        now_s = self.services.clock()
        for keeper in self._keepers:
            kept = keeper.keep(endpoints, now_s)
            if kept is not None:
                return State(wall_s, kept)
        return None

    def restore(self, state: State, passed_s: float) -> None:
        """Begin with what was known ``passed_s`` ago, before the first request."""
        now_s = self.services.clock()
        for keeper in self._keepers:
            keeper.recall(state.kept, now_s - passed_s, now_s)

    def schedule(self, request: InferenceRequest, endpoints: Sequence[Endpoint]) -> Decision:
        """Choose among ``endpoints`` (not empty) and tell the observers that the request goes there.

        ``Saturated`` when an admitter says so or the filters leave none, or for a request of negative
        priority when the pool is full; ``PreconditionFailed`` when it may go only where its prefix is
        cached and that is nowhere.
        """
        if request.priority < 0 and self.saturation(endpoints) >= 1.0:
            raise Saturated("the endpoints are full and this request has a negative priority")
        cycle = Cycle(request, endpoints, self.services)
        for admitter in self._admitters:
            admitter.admit(cycle)
        profile = self._only
        if profile is None or self._handler is not None:
            name = self._handler.profile(cycle, self._names) if self._handler else self._names[0]
            profile = self.profiles[name]
        decision = profile.run(cycle)
        if not decision.matched_tokens and _only_if_available(request):
            raise PreconditionFailed("no endpoint that may take this request has its prefix in cache")
        services, match, slot = self.services, cycle.match, decision.chosen.slot
        if match.chains:
            services.prefix.insert(slot, match.chains)
        if match.told is not None and services.precise is not None:
            services.precise.sent(slot, request, services.clock(), match.told)
        for observer in self._dispatch:
            observer.on_dispatch(cycle, decision)
        return decision

    def finish(self, request: InferenceRequest, decision: Decision, outcome: Outcome) -> None:
        """The request is over."""
        for observer in self._outcome:
            observer.on_outcome(request, decision, outcome)


def _only_if_available(request: InferenceRequest) -> bool:
    headers = request.headers
    return "prefer" in headers and any(
        part.strip().lower() == IF_AVAILABLE for part in headers["prefer"].split(",")
    )
