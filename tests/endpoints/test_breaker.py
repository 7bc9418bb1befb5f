"""The breaker's laws, over every order of events."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pointsman.config import Breaker as Settings
from pointsman.endpoints.breaker import Breaker, State

SETTINGS = Settings(faults=3, open_s=1.0, max_open_s=8.0)


def opened(now: float = 0.0) -> Breaker:
    breaker = Breaker(SETTINGS)
    breaker.fault(now, certain=True)
    return breaker


def test_it_opens_after_as_many_faults_in_a_row_as_set() -> None:
    breaker = Breaker(SETTINGS)
    assert [breaker.fault(0.0) for _ in range(3)] == [False, False, True]
    assert not breaker.passes


def test_an_answer_in_between_starts_the_count_again() -> None:
    breaker = Breaker(SETTINGS)
    for _ in range(10):
        breaker.fault(0.0)
        breaker.fault(0.0)
        assert not breaker.success()
    assert breaker.passes


def test_nobody_listening_opens_at_once() -> None:
    assert opened().state is State.OPEN


def test_the_time_doubles_with_each_failed_probe_up_to_its_limit_and_starts_anew_after_an_answer() -> None:
    breaker = opened()
    waits = []
    for _ in range(6):
        waits.append(breaker.retry_at_s)
        breaker.half_open()
        breaker.fault(0.0)
    assert waits == [1.0, 2.0, 4.0, 8.0, 8.0, 8.0]
    assert breaker.success()
    breaker.fault(0.0, certain=True)
    assert breaker.retry_at_s == 1.0


def test_faults_while_it_is_open_do_not_double() -> None:
    breaker = opened()
    for now in (0.1, 0.2, 0.3):
        breaker.fault(now, certain=True)
    assert breaker.retry_at_s == pytest.approx(1.3)


@given(st.floats(0.1, 100), st.floats(0.1, 100), st.integers(0, 20))
def test_it_is_never_open_for_longer_than_its_limit(open_s: float, max_open_s: float, probes: int) -> None:
    breaker = Breaker(Settings(open_s=open_s, max_open_s=max_open_s))
    breaker.fault(0.0, certain=True)
    for _ in range(probes):
        breaker.half_open()
        breaker.fault(0.0)
    assert 0 < breaker.retry_at_s <= max_open_s


class Laws(RuleBasedStateMachine):
    """Requests in flight, each of which ends in an answer, a fault, or the client's leaving."""

    def __init__(self) -> None:
        super().__init__()
        self.breaker = Breaker(SETTINGS)
        self.now = 0.0
        self.probe = False
        self.faults_in_row = 0

    @rule(seconds=st.floats(0, 10))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        if self.breaker.state is State.OPEN and self.now >= self.breaker.retry_at_s:
            self.breaker.half_open()

    @precondition(lambda self: self.breaker.passes and self.breaker.state is State.HALF_OPEN)
    @rule()
    def probe_is_sent(self) -> None:
        assert not self.probe, "a second probe"
        self.breaker.probing = self.probe = True

    @rule()
    def answer(self) -> None:
        self.breaker.success()
        self.probe, self.faults_in_row = False, 0
        assert self.breaker.state is State.CLOSED

    @rule(certain=st.booleans())
    def fault(self, certain: bool) -> None:
        before = self.breaker.state
        changed = self.breaker.fault(self.now, certain=certain)
        self.probe = False
        self.faults_in_row += 1
        assert changed == (self.breaker.state is not before)
        if before is not State.CLOSED or certain:
            assert self.breaker.state is State.OPEN
        assert (self.breaker.state is State.OPEN) <= (
            certain or before is not State.CLOSED or self.faults_in_row >= SETTINGS.faults
        )

    @precondition(lambda self: self.probe)
    @rule()
    def client_of_the_probe_leaves(self) -> None:
        self.breaker.abandon()
        self.probe = False
        assert self.breaker.passes

    @invariant()
    def passes_when_closed_or_for_one_probe(self) -> None:
        expected = {State.CLOSED: True, State.OPEN: False, State.HALF_OPEN: not self.probe}
        assert self.breaker.passes is expected[self.breaker.state]

    @invariant()
    def opens_for_a_bounded_time(self) -> None:
        if self.breaker.state is State.OPEN:
            assert self.breaker.retry_at_s - self.now <= SETTINGS.max_open_s + 1e-6


TestLaws = Laws.TestCase
TestLaws.settings = settings(max_examples=50, stateful_step_count=30)
