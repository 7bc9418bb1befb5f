"""What the counters of an engine tell of requests whose responses go past us."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from pointsman.endpoints.unseen import Unseen, asked
from pointsman.router import Flight
from pointsman.testing import fleet, request
from pointsman.types import Decision, Endpoint, Load, Metrics


def send(endpoint: Endpoint, at_s: float, tokens: int = 100, *, seen: bool = False) -> Flight:
    decision = Decision("r", "m", at_s, "p", [endpoint], endpoint, prompt_tokens=tokens)
    return Flight(request(stream=True), decision, seen)


class Engine:
    """A metrics page that grows."""

    def __init__(self) -> None:
        (self.endpoint,) = fleet(1)
        self.unseen = Unseen()
        self.values = {"at_s": 0.0, "first_tokens": 1000.0, "first_wait_s": 500.0, "ended": 1000.0}
        self.reads()

    @property
    def load(self) -> Load:
        return self.endpoint.load

    def reads(self, **more: float) -> None:
        """The next page: ``running`` and ``waiting`` as given, counters by so much more."""
        gauges = {name: more.pop(name, 0.0) for name in ("running", "waiting")}
        more = {"at_s": 0.1} | more
        for name, value in more.items():
            self.values[name] = self.values.get(name, 0.0) + value
        fields: Mapping[str, float] = self.values | gauges
        self.unseen.read(self.load, Metrics(**fields), asked(self.load))


def test_the_oldest_requests_are_those_that_had_their_first_token() -> None:
    engine = Engine()
    for i in range(3):
        send(engine.endpoint, 10.0 + i, 100 * (i + 1))
    engine.reads(running=2, waiting=1)
    assert engine.load.tokens == 600
    engine.reads(running=3, first_tokens=2, first_wait_s=1.0)
    assert engine.load.tokens == 300
    assert (engine.load.first_outputs, engine.load.first_wait_s) == (2, 1.0)
    assert engine.load.ahead_tokens == 100 + 250, "the first is half computed when the second comes"
    engine.reads(running=3, first_tokens=1, first_wait_s=0.25)
    assert (engine.load.tokens, engine.load.first_wait_s) == (0, 1.25)


def test_a_request_sent_after_the_page_was_asked_for_is_not_on_it() -> None:
    engine = Engine()
    before = asked(engine.load)
    send(engine.endpoint, 10.0)
    engine.unseen.read(engine.load, Metrics(**engine.values), before)
    assert engine.load.tokens == 100


def test_what_we_see_ourselves_is_not_taken_from_the_counters() -> None:
    engine = Engine()
    flight = send(engine.endpoint, 10.0, seen=True)
    engine.reads(running=1, first_tokens=1, first_wait_s=3.0)
    assert engine.load.tokens == 100
    flight.first_output(12.0)
    assert (engine.load.tokens, engine.load.first_wait_s) == (0, 2.0)


@pytest.mark.parametrize("aborted", [0, 7])
def test_requests_that_broke_off_before_their_first_token_do_not_hide_others_for_long(aborted: int) -> None:
    engine = Engine()
    for _ in range(300):  # half a minute of one request after the other
        flight = send(engine.endpoint, engine.values["at_s"])
        engine.reads(running=1, first_tokens=1, first_wait_s=0.1, ended=aborted)
        aborted = 0
        flight.release()
        engine.reads(ended=1)
    send(engine.endpoint, engine.values["at_s"])
    engine.reads(running=1, first_tokens=1, first_wait_s=0.1)
    assert engine.load.tokens == 0


def test_requests_of_others_are_those_that_are_not_ours() -> None:
    engine = Engine()
    ours = [send(engine.endpoint, 10.0) for _ in range(2)]
    changes = engine.load.changes
    engine.reads(running=4, waiting=1)
    assert engine.load.others == 3
    assert engine.load.changes > changes
    for flight in ours:
        flight.release()
    engine.reads(running=1)
    assert engine.load.others == 1
    engine.reads()
    assert engine.load.others == 0


def test_how_long_an_answer_is_follows_from_how_far_others_got() -> None:
    engine = Engine()
    flight = send(engine.endpoint, 10.0)
    assert flight.likely_tokens() is None
    engine.reads(running=4, first_tokens=4, first_wait_s=1.0, generation_tokens=4)
    for _ in range(50):
        engine.reads(running=4, generation_tokens=8)
    assert flight.likely_tokens() == pytest.approx(101, abs=2)
    flight.release()
    assert flight.likely_tokens() is None


def test_a_restarted_engine_takes_nothing_back() -> None:
    engine = Engine()
    flight = send(engine.endpoint, 10.0)
    engine.reads(running=1, first_tokens=1, first_wait_s=0.1, generation_tokens=10)
    engine.reads(running=1, generation_tokens=10)
    before = flight.likely_tokens()
    assert before
    engine.values |= {"first_tokens": 0.0, "first_wait_s": 0.0, "ended": 0.0, "generation_tokens": 0.0}
    engine.reads()
    assert flight.likely_tokens() == before
    assert engine.load.first_outputs == 1
