"""A decision from end to end: record, admission, profiles, who is told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from pointsman.errors import PreconditionFailed, Saturated
from pointsman.registry import Plugin
from pointsman.scheduling.cycle import Cycle
from pointsman.scheduling.handlers.header import HeaderProfile
from pointsman.scheduling.pickers.max_score import MaxScore
from pointsman.scheduling.profile import Profile
from pointsman.scheduling.saturation.concurrency import ConcurrencyDetector
from pointsman.scheduling.scheduler import Scheduler
from pointsman.testing import fleet, request, services
from pointsman.types import Decision, Ending, Endpoint, InferenceRequest, Outcome

TEXT = "x" * 2048


class Only(Plugin):
    """Keep the endpoints of these names."""

    names: tuple[str, ...]

    def filter(self, cycle: Cycle) -> Sequence[Endpoint]:
        return [e for e in cycle.endpoints if e.name in self.names]


class Fixed(Plugin):
    """Scores by name."""

    scores: dict[str, float]

    def score(self, cycle: Cycle) -> Sequence[float]:
        return [self.scores[e.name] for e in cycle.endpoints]


class Listener(Plugin):
    """Writes down what it is told."""

    def __post_init__(self) -> None:
        self.heard: list[str] = []

    def on_dispatch(self, cycle: Cycle, decision: Decision) -> None:
        self.heard.append(f"sent to {decision.chosen.name}")

    def on_outcome(self, request: InferenceRequest, decision: Decision, outcome: Outcome) -> None:
        self.heard.append(outcome.ending.value)


def profile(name: str = "default", *, filters: Any = (), scorers: Any = ()) -> Profile:
    return Profile(name, filters, scorers, MaxScore())


def scheduler(*profiles: Profile, **options: Any) -> Scheduler:
    made = Scheduler(profiles or (profile(),), services(clock=lambda: 5.0), **options)
    for slot in range(4):
        made.services.prefix.add(slot)
    return made


def test_a_decision_tells_everything() -> None:
    pool = fleet(3)
    some = Only(names=("e0", "e2"))
    a, b = Fixed(scores={"e0": 0.5, "e2": 0.25}), Fixed(scores={"e0": 0.0, "e2": 1.0})
    made = scheduler(profile(filters=[("some", some)], scorers=[("a", 1.0, a), ("b", 3.0, b)]))
    decision = made.schedule(request(TEXT), pool)
    assert decision.chosen is pool[2]
    assert decision.candidates is pool
    assert decision.scored == [pool[0], pool[2]]
    assert decision.kept == {"some": [pool[0], pool[2]]}
    assert decision.scores == {"a": [0.5, 0.25], "b": [0.0, 1.0]}
    assert decision.weights == {"a": 1.0, "b": 3.0}
    assert (decision.profile, decision.at_s, decision.model) == ("default", 5.0, "m")
    assert (decision.prompt_tokens, decision.matched_tokens) == (512, 0)


def test_the_next_request_finds_the_prefix_where_it_was_sent() -> None:
    made, pool = scheduler(), fleet(3)
    first = made.schedule(request(TEXT), pool)
    again = made.schedule(request(TEXT), [first.chosen])
    assert (first.matched_tokens, again.matched_tokens) == (0, 512)


def test_scores_decide_by_their_weighted_sum() -> None:
    a, b = Fixed(scores={"e0": 1.0, "e1": 0.0}), Fixed(scores={"e0": 0.0, "e1": 0.4})
    light = scheduler(profile(scorers=[("a", 1.0, a), ("b", 2.0, b)]))
    heavy = scheduler(profile(scorers=[("a", 1.0, a), ("b", 3.0, b)]))
    assert light.schedule(request(), fleet(2)).chosen.name == "e0"
    assert heavy.schedule(request(), fleet(2)).chosen.name == "e1"


def test_filters_that_leave_nobody_are_a_429() -> None:
    made = scheduler(profile(filters=[("nobody", Only(names=()))]))
    with pytest.raises(Saturated, match="nobody"):
        made.schedule(request(), fleet(2))


def test_observers_are_told_of_dispatch_and_outcome() -> None:
    listener = Listener()
    made = scheduler(plugins=[listener])
    asked = request()
    decision = made.schedule(asked, fleet(1))
    made.finish(asked, decision, Outcome(ending=Ending.OK, status=200))
    assert listener.heard == ["sent to e0", "ok"]


def test_a_negative_priority_is_refused_by_a_full_pool() -> None:
    listener = Listener()
    made = scheduler(detector=ConcurrencyDetector(max_concurrency=10), plugins=[listener])
    full, roomy = fleet(requests=[10, 10]), fleet(requests=[10, 9])
    with pytest.raises(Saturated, match="negative priority"):
        made.schedule(request(priority=-1), full)
    assert listener.heard == []
    assert made.schedule(request(priority=-1), roomy)
    assert made.schedule(request(priority=0), full)
    assert scheduler().schedule(request(priority=-1), full)


@pytest.mark.parametrize("prefer", ["if-available", "respond-async, If-Available"])
def test_only_if_available_is_a_412_where_nothing_is_cached(prefer: str) -> None:
    listener = Listener()
    made, pool = scheduler(plugins=[listener]), fleet(1)
    asked = request(TEXT, headers={"prefer": prefer})
    for _ in range(2):  # a refused request must not count as sent
        with pytest.raises(PreconditionFailed):
            made.schedule(asked, pool)
    assert listener.heard == []
    made.schedule(request(TEXT), pool)
    assert made.schedule(asked, pool).matched_tokens == 512


def test_other_preferences_are_nothing_to_us() -> None:
    assert scheduler().schedule(request(TEXT, headers={"prefer": "respond-async"}), fleet(1))


def test_the_header_names_the_profile() -> None:
    made = scheduler(profile("prefill"), profile("decode"), handler=HeaderProfile())

    def ran(**headers: str) -> str:
        return made.schedule(request(headers=headers), fleet(1)).profile

    assert ran(**{"epp-profile": "prefill"}) == "prefill"
    assert ran() == "decode"
    assert ran(**{"epp-profile": " "}) == "decode"
    with pytest.raises(Saturated, match="encode"):
        ran(**{"epp-profile": "encode"})


def test_the_only_profile_runs_whatever_the_header_says() -> None:
    made = scheduler(profile("all"), handler=HeaderProfile())
    assert made.schedule(request(headers={"epp-profile": "x"}), fleet(1)).profile == "all"
