"""The configured plugins put together: which profile runs, and who is told of dispatches and outcomes."""

from __future__ import annotations

from collections.abc import Sequence

from pointsman.registry import Plugin
from pointsman.scheduling.cycle import Cycle, Services
from pointsman.scheduling.interfaces import DispatchObserver, OutcomeObserver, Preparing, ProfileHandler
from pointsman.scheduling.profile import Profile
from pointsman.scheduling.signals import prefix_match
from pointsman.types import Decision, Endpoint, InferenceRequest, Outcome


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
    ) -> None:
        assert profiles, "a scheduler needs a profile"
        self.profiles = {profile.name: profile for profile in profiles}
        self._names = tuple(self.profiles)
        self._only = profiles[0] if len(profiles) == 1 else None
        self._handler = handler
        self.services = services
        self.plugins = tuple(plugins)
        self._dispatch = [p for p in plugins if isinstance(p, DispatchObserver)]
        self._outcome = [p for p in plugins if isinstance(p, OutcomeObserver)]
        for plugin in plugins:
            if isinstance(plugin, Preparing):
                plugin.prepare(services)

    def schedule(self, request: InferenceRequest, endpoints: Sequence[Endpoint]) -> Decision:
        """Choose among ``endpoints`` (not empty) and tell the observers that the request goes there."""
        cycle = Cycle(request, endpoints, self.services)
        profile = self._only
        if profile is None or self._handler is not None:
            name = self._handler.profile(cycle, self._names) if self._handler else self._names[0]
            profile = self.profiles[name]
        decision = profile.run(cycle)
        self.services.prefix.insert(decision.chosen.slot, cycle.get(prefix_match).chains)
        for observer in self._dispatch:
            observer.on_dispatch(cycle, decision)
        return decision

    def finish(self, request: InferenceRequest, decision: Decision, outcome: Outcome) -> None:
        """The request is over."""
        for observer in self._outcome:
            observer.on_outcome(request, decision, outcome)
