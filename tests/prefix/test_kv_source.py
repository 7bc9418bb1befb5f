"""One stream of KV events: gaps, replays, restarts; no sockets, and a clock that stands until it is moved."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pointsman.prefix.kv_source import END, HELD_FRAMES, Source, Timing
from pointsman.prefix.kv_wire import Event, Removed, Stored
from pointsman.testing.kv_publisher import CLEARED, batch, removed, stored

TIMING = Timing()


def seq(number: int) -> bytes:
    return number.to_bytes(8, "big")


class Endpoint:
    """The owner of one source, and the blocks that it believes to be there."""

    def __init__(self, *, can_replay: bool = True) -> None:
        self.now = 0.0
        self.held: set[int] = set()
        self.asked: list[int] = []
        self.open = False
        self.late = 0
        self.source = Source(0, self, lambda: self.now, TIMING, can_replay=can_replay)

    def apply(self, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event, Stored):
                self.held |= set(event.hashes)
            elif isinstance(event, Removed):
                self.held -= set(event.hashes)
            else:
                self.held.clear()

    def begun_late(self) -> None:
        self.late += 1

    def lost(self, source: Source) -> None:
        self.held.clear()

    def restarted(self, source: Source) -> None:
        self.held.clear()
        source.begin_again()

    def replay(self, source: Source, start: int) -> None:
        self.asked.append(start)
        self.open = True

    def replay_ended(self, source: Source) -> None:
        self.open = False

    # -- what comes

    def hears(self, number: int, *events: object, ts: float | None = None) -> None:
        self.source.take([b"kv@e@m", seq(number), message(number, *events, ts=ts)])

    def answer(self, *numbers: int) -> None:
        """A whole answer, in which message n stores block n."""
        for number in numbers:
            self.source.replayed([b"", b"kv@e@m", seq(number), message(number)])
        self.source.replayed([b"", b"", seq(END), b""])

    def passes(self, seconds: float) -> None:
        self.now += seconds
        self.source.tick()


def message(number: int, *events: object, ts: float | None = None) -> bytes:
    return batch(*(events or (stored([number]),)), ts=number if ts is None else ts)


@pytest.fixture
def endpoint() -> Endpoint:
    """Connected; the first replay brought messages 0 to 2."""
    made = Endpoint()
    made.source.connection(True)
    made.answer(0, 1, 2)
    assert made.asked == [0]
    assert made.held == {0, 1, 2}
    assert made.source.live
    made.asked.clear()
    return made


def test_messages_are_applied_as_they_come(endpoint: Endpoint) -> None:
    endpoint.hears(3)
    endpoint.hears(4, removed(0), stored([40, 41]))
    endpoint.hears(5, CLEARED, stored([5]))
    assert endpoint.held == {5}
    assert endpoint.asked == []
    now = endpoint.source.snapshot("e", "a", "r")
    assert (now.frames, now.events, now.blocks, now.replays) == (6, 8, 8, 1)
    assert (now.gaps, now.restarts, now.cleared, now.malformed) == (0, 0, 0, 0)


def test_what_comes_before_the_first_replay_ends_waits_for_it() -> None:
    endpoint = Endpoint()
    endpoint.hears(2, removed(1))
    endpoint.hears(3)
    assert endpoint.asked == [0]
    assert endpoint.held == set()
    assert not endpoint.source.live
    endpoint.source.replayed([b"", seq(0), message(0)])  # without topic, as some versions answer
    endpoint.source.replayed([b"", seq(1), message(1)])
    endpoint.source.replayed([b"", seq(2), message(2, removed(1))])
    endpoint.source.replayed([b"", seq(END), b""])
    assert endpoint.held == {0, 3}
    assert not endpoint.open


def test_a_gap_is_filled_from_the_last_message_that_is_known(endpoint: Endpoint) -> None:
    endpoint.hears(6)
    assert endpoint.asked == [2]
    endpoint.hears(7)
    endpoint.answer(2, 3, 4, 5, 6)
    assert endpoint.held == {0, 1, 2, 3, 4, 5, 6, 7}
    assert (endpoint.source.gaps, endpoint.source.replays, endpoint.source.cleared) == (1, 2, 0)


def test_what_a_replay_brought_may_come_again_live(endpoint: Endpoint) -> None:
    endpoint.hears(4)
    endpoint.answer(2, 3, 4, 5, 6)
    endpoint.hears(5)
    endpoint.hears(6)
    endpoint.hears(7, removed(3))
    assert endpoint.held == {0, 1, 2, 4, 5, 6}
    assert endpoint.source.restarts == 0


def test_a_gap_that_the_engine_no_longer_has_empties_what_was_known(endpoint: Endpoint) -> None:
    endpoint.hears(9)
    endpoint.answer(7, 8, 9)
    assert endpoint.held == {7, 8, 9}
    assert (endpoint.source.cleared, endpoint.source.gaps) == (1, 1)
    endpoint.hears(10)
    assert endpoint.source.live
    assert 10 in endpoint.held


def test_a_gap_without_replays_empties_what_was_known() -> None:
    endpoint = Endpoint(can_replay=False)
    endpoint.hears(7)
    endpoint.hears(8)
    assert endpoint.held == {7, 8}
    endpoint.hears(10)
    assert endpoint.held == {10}
    assert (endpoint.source.cleared, endpoint.source.gaps, endpoint.asked) == (1, 1, [])


@pytest.mark.parametrize(("first", "late"), [(0, 0), (7, 1)])
def test_who_is_heard_in_mid_stream_has_told_things_before(first: int, late: int) -> None:
    endpoint = Endpoint(can_replay=False)
    endpoint.hears(first)
    endpoint.hears(first + 1)
    assert endpoint.late == late


def test_an_answer_with_a_hole_is_asked_for_again_from_there(endpoint: Endpoint) -> None:
    """A ROUTER drops what its queue cannot take."""
    endpoint.hears(9)
    endpoint.answer(2, 3, 4, 8, 9)
    assert endpoint.asked == [2, 4]
    assert endpoint.held == {0, 1, 2, 3, 4}
    endpoint.answer(4, 5, 6, 7, 8, 9)
    assert endpoint.held == set(range(10))
    assert endpoint.source.cleared == 0


def test_a_hole_that_stays_is_a_loss(endpoint: Endpoint) -> None:
    endpoint.hears(9)
    endpoint.answer(2, 8, 9)
    assert not endpoint.open
    assert endpoint.held == {9}
    assert (endpoint.source.cleared, endpoint.source.replays_failed) == (1, 1)


def test_a_silent_replay_is_tried_twice_and_then_given_up(endpoint: Endpoint) -> None:
    endpoint.hears(5)
    endpoint.passes(TIMING.idle_s + 0.1)
    assert endpoint.asked == [2]
    endpoint.passes(TIMING.retry_s - 0.1)
    assert endpoint.asked == [2]
    endpoint.hears(6)
    endpoint.passes(0.2)
    assert endpoint.asked == [2, 2]
    assert endpoint.held == {0, 1, 2}
    endpoint.passes(TIMING.idle_s + 0.1)
    assert not endpoint.open
    assert endpoint.held == {5, 6}
    assert (endpoint.source.replays_failed, endpoint.source.cleared, endpoint.source.gaps) == (1, 1, 1)

    endpoint.hears(8)  # nobody is asked for a while
    assert endpoint.asked == [2, 2]
    assert endpoint.held == {8}
    endpoint.passes(TIMING.cooldown_s)
    endpoint.hears(10)
    assert endpoint.asked == [2, 2, 8]


def test_an_answer_that_comes_late_is_still_one(endpoint: Endpoint) -> None:
    endpoint.hears(4)
    endpoint.passes(TIMING.idle_s + 1)
    endpoint.answer(2, 3, 4)
    endpoint.passes(TIMING.retry_s)
    assert endpoint.asked == [2]
    assert endpoint.held == {0, 1, 2, 3, 4}


def test_a_replay_that_never_ends_is_given_up(endpoint: Endpoint) -> None:
    endpoint.hears(1000)
    endpoint.source.replayed([b"", seq(2), message(2)])
    for number in range(3, 200):
        endpoint.source.replayed([b"", seq(number), message(number)])
        endpoint.passes(1)
        if not endpoint.open:
            break
    assert TIMING.total_s <= number <= TIMING.total_s + 5
    assert endpoint.held == {1000}


def test_a_number_that_comes_again_is_an_engine_that_began_anew(endpoint: Endpoint) -> None:
    endpoint.hears(0, stored([100]), ts=50)
    assert endpoint.held == set()
    assert endpoint.asked == [0]
    endpoint.source.replayed([b"", b"t", seq(0), message(0, stored([100]), ts=50)])
    endpoint.source.replayed([b"", b"", seq(END), b""])
    assert endpoint.held == {100}
    assert endpoint.source.restarts == 1
    endpoint.hears(1)
    assert endpoint.held == {100, 1}


def test_without_replays_a_restart_is_taken_as_it_comes() -> None:
    endpoint = Endpoint(can_replay=False)
    endpoint.hears(0)
    endpoint.hears(1)
    endpoint.hears(0, stored([100]), ts=50)
    endpoint.hears(1, stored([101]), ts=51)
    assert endpoint.held == {100, 101}
    assert (endpoint.source.restarts, endpoint.source.cleared) == (1, 0)


def test_a_restart_right_after_a_replay_is_told_from_messages_that_come_again(endpoint: Endpoint) -> None:
    endpoint.hears(1, stored([100]), ts=50)  # the engine's clock went on
    assert endpoint.source.restarts == 1


def test_a_reconnection_finds_what_was_missed_although_nothing_came_since(endpoint: Endpoint) -> None:
    endpoint.source.connection(False)
    assert not endpoint.source.live
    endpoint.source.connection(True)
    endpoint.answer(2, 3, 4)
    assert endpoint.held == {0, 1, 2, 3, 4}
    assert endpoint.source.live


def test_a_reconnection_to_an_engine_that_is_another_forgets_the_old_one(endpoint: Endpoint) -> None:
    endpoint.source.connection(True)
    endpoint.source.replayed([b"", b"t", seq(2), message(2, stored([100]), ts=77)])
    assert endpoint.asked == [1 + 1, 0]
    endpoint.answer(0, 1)
    assert endpoint.held == {0, 1}
    assert endpoint.source.restarts == 1


def test_a_reconnection_to_an_engine_that_has_published_less_forgets_the_old_one(endpoint: Endpoint) -> None:
    endpoint.source.connection(True)
    endpoint.answer()
    assert endpoint.asked == [2, 0]
    endpoint.answer()
    assert endpoint.held == set()
    assert endpoint.source.live


def test_a_reconnection_asks_even_while_others_would_have_to_wait(endpoint: Endpoint) -> None:
    endpoint.hears(5)
    for _ in range(3):
        endpoint.passes(TIMING.idle_s + TIMING.retry_s)
    assert not endpoint.open
    endpoint.source.connection(True)
    assert endpoint.open


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [b"kv@e@m"],
        [b"kv@e@m", seq(3)],
        [b"kv@e@m", seq(3), message(3), b"more"],
        [b"kv@e@m", b"\x03", message(3)],
        [b"kv@e@m", b"", message(3)],
        [b"kv@e@m", seq(3) + b"\x00", message(3)],
        [b"\xff\xfe", seq(3), message(3)],
        [b"kv@e@m", seq(3), b"\xc1"],
    ],
)
def test_a_malformed_message_is_counted_and_the_stream_goes_on(
    endpoint: Endpoint, parts: list[bytes]
) -> None:
    endpoint.source.take(parts)
    assert endpoint.source.malformed == 1
    endpoint.hears(4 if parts[2:] == [b"\xc1"] else 3)
    assert endpoint.source.live
    assert len(endpoint.held) == 4


@pytest.mark.parametrize(
    "parts", [[], [b""], [b"", b"", b"", b"", b""], [b"", b"\x01", b""], [b"t", b"", b""]]
)
def test_a_malformed_answer_is_counted_and_the_replay_goes_on(endpoint: Endpoint, parts: list[bytes]) -> None:
    endpoint.hears(4)
    endpoint.source.replayed(parts)
    assert endpoint.source.malformed == 1
    endpoint.answer(2, 3, 4)
    assert endpoint.held == {0, 1, 2, 3, 4}


def test_an_answer_that_nobody_asked_for_is_ignored(endpoint: Endpoint) -> None:
    endpoint.answer(3, 4)
    assert endpoint.held == {0, 1, 2}


def test_what_waits_for_a_replay_is_bounded_and_what_did_not_fit_is_had_again(endpoint: Endpoint) -> None:
    last = 4 + HELD_FRAMES + 10
    for number in range(4, last):
        endpoint.hears(number)
    assert len(endpoint.source._held) == HELD_FRAMES
    endpoint.answer(2, 3, 4)
    assert endpoint.held == set(range(4 + HELD_FRAMES))
    endpoint.hears(last)
    endpoint.answer(*range(4 + HELD_FRAMES - 1, last + 1))
    assert endpoint.held == set(range(last + 1))
    assert (endpoint.source.gaps, endpoint.source.cleared) == (2, 0)


class Stream(RuleBasedStateMachine):
    """An engine, a connection that loses, cuts and delays, and replays that are cut off or time out.

    Law: what is believed at rest is true; and all of it is known if the engine still had what was missed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.endpoint = Endpoint()
        self.clock = 0.0
        self.truth: set[int] = set()
        self.history: list[bytes] = []
        self.oldest = 0
        self.wire: list[tuple[int, bytes]] = []
        self.blocks = 0

    @initialize(can_replay=st.booleans())
    def connect(self, can_replay: bool) -> None:
        self.can_replay = can_replay
        self.endpoint = Endpoint(can_replay=can_replay)
        self.endpoint.source.connection(True)

    def publish(self, event: object, lost: bool) -> None:
        self.clock += 1
        payload = batch(event, ts=self.clock)
        if not lost:
            self.wire.append((len(self.history), payload))
        self.history.append(payload)

    @rule(lost=st.booleans())
    def store(self, lost: bool) -> None:
        self.blocks += 1
        self.truth.add(self.blocks)
        self.publish(stored([self.blocks]), lost)

    @precondition(lambda self: self.truth)
    @rule(lost=st.booleans())
    def remove(self, lost: bool) -> None:
        block = min(self.truth)
        self.truth.remove(block)
        self.publish(removed(block), lost)

    @rule()
    def clear(self) -> None:
        self.truth.clear()
        self.publish(CLEARED, False)

    @rule(seconds=st.sampled_from([0.5, 3.0, 40.0]))
    def wait(self, seconds: float) -> None:
        self.endpoint.passes(seconds)

    @rule(count=st.integers(1, 5))
    def deliver(self, count: int) -> None:
        for number, payload in self.wire[:count]:
            self.endpoint.source.take([b"kv@e@m", seq(number), payload])
        del self.wire[:count]

    @rule(keep=st.integers(0, 4))
    def forget(self, keep: int) -> None:
        """The engine's buffer moves on."""
        self.oldest = max(self.oldest, len(self.history) - keep)

    @precondition(lambda self: self.endpoint.open)
    @rule(cut=st.integers(0, 4), drop=st.booleans())
    def answer(self, cut: int, drop: bool) -> None:
        """To the question that is open, perhaps only its beginning or with a hole."""
        start = max(self.endpoint.asked[-1], self.oldest)
        numbers = list(range(start, len(self.history)))
        if cut:
            numbers = numbers[:cut]
        elif drop and len(numbers) > 2:
            del numbers[len(numbers) // 2]
        count = len(self.endpoint.asked)
        for number in numbers:
            if len(self.endpoint.asked) > count:
                return  # another question: this answer's connection is closed
            self.endpoint.source.replayed([b"", b"t", seq(number), self.history[number]])
        if not cut and len(self.endpoint.asked) == count:
            self.endpoint.source.replayed([b"", b"", seq(END), b""])

    @rule()
    def cut(self) -> None:
        self.wire.clear()
        self.endpoint.source.connection(False)
        self.endpoint.source.connection(True)

    @rule()
    def restart(self) -> None:
        self.history, self.oldest = [], 0
        self.truth.clear()
        if not self.can_replay:  # then only the pool can tell a restart from a connection that was cut
            self.endpoint.restarted(self.endpoint.source)
        self.cut()

    @invariant()
    def at_rest_nothing_is_believed_that_is_not(self) -> None:
        source = self.endpoint.source
        if source.live and not self.wire and self.history and source._next == len(self.history):
            assert self.endpoint.held <= self.truth

    def teardown(self) -> None:
        """A message more, and everything that is asked for is answered."""
        self.store(lost=False)
        for _ in range(12):
            self.deliver(len(self.wire))
            if self.endpoint.open:
                self.answer(0, False)
        assert self.endpoint.source.live
        assert self.endpoint.source._next == len(self.history)
        assert self.endpoint.held <= self.truth
        assert self.blocks in self.endpoint.held


TestStream = Stream.TestCase
TestStream.settings = settings(
    max_examples=150, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
