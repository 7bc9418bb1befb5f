"""One stream of KV events: which messages are applied, in which order, and what to do when some are missing.

Messages of a source carry sequence numbers that begin at 0 when its engine starts. A number that is skipped
is a gap: the missing messages are asked of the engine again (a replay), and what comes meanwhile is held. A
number that comes again means that the engine has started anew. A replay begins with the last message
that is known already: when it comes back as it was, the engine is the one we knew.

Plain synchronous code without sockets. ``kv_socket`` brings messages, ``kv_events`` owns the sources.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from typing import Protocol

import msgspec
from xxhash import xxh3_64_intdigest

from pointsman.prefix.kv_wire import Batch, Event, MalformedFrame, Removed, Stored, decode
from pointsman.types import Clock

log = logging.getLogger(__name__)

SEQ_BYTES = 8
END = (1 << 64) - 1
"""The sequence number of a replay's last message (-1 in eight bytes), which carries nothing."""
HELD_FRAMES = 1024
HELD_BYTES = 4 * 1024 * 1024
"""Messages kept while a replay runs, and then applied at once: in some 40 ms. What comes beyond that is
dropped, which is a gap once more.
"""


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """How long a replay may take, seconds: llm-d's figures (facts 5.2)."""

    idle_s: float = 2.0
    """A replay that is silent for so long has failed."""
    retry_s: float = 5.0
    """From there to the second attempt."""
    total_s: float = 120.0
    cooldown_s: float = 30.0
    """After a replay that failed twice none is asked for."""


class KvEventSource(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one source of KV events, for people and metrics."""

    endpoint: str
    rank: int
    """Data-parallel rank; 0 where there is only one engine."""
    address: str
    """Where we listen: the engine's address, or our own that it connects to."""
    replay: str
    """Where missed messages can be had; empty: nowhere."""
    connected: bool
    live: bool
    """Connected, and nothing is being asked again: what the index has from it is up to date."""
    frames: int
    events: int
    blocks: int
    """In these events."""
    last_event_s: float | None
    """On the caller's clock."""
    gaps: int
    """Times that messages were missing."""
    replays: int
    """Replays that ended well."""
    replays_failed: int
    restarts: int
    """Times that the engine began anew."""
    cleared: int
    """Times that what was known of the endpoint was thrown away because a gap could not be filled."""
    malformed: int
    """Messages that are none."""
    skipped: int
    """Events in whole messages that could not be read."""


class Owner(Protocol):
    """What a source needs of whoever owns it and its endpoint's other sources."""

    def apply(self, events: Sequence[Event]) -> None:
        """In this order."""

    def begun_late(self) -> None:
        """What a source has told before now is not known and cannot be had."""

    def lost(self, source: Source) -> None:
        """Forget what is known of the endpoint: ``source`` misses messages for good."""

    def restarted(self, source: Source) -> None:
        """The same: its engine has started anew. ``source`` and the endpoint's others begin again."""

    def replay(self, source: Source, start: int) -> None:
        """Ask for the messages from ``start`` on, dropping an earlier question."""

    def replay_ended(self, source: Source) -> None:
        """Nothing more is expected of the replay."""


class _Replay:
    __slots__ = ("attempts", "began_s", "first", "heard_s", "hole", "retry_at_s", "start")

    def __init__(self, now_s: float) -> None:
        self.start = 0
        self.began_s = self.heard_s = now_s
        self.first = True
        """Nothing from ``start`` on has come yet."""
        self.hole = False
        """Messages are missing in the answer: more were sent than the connection took."""
        self.attempts = 1
        self.retry_at_s: float | None = None


class Source:
    """The state of one stream. ``can_replay`` tells whether anybody answers to ``Owner.replay``."""

    def __init__(self, rank: int, owner: Owner, clock: Clock, timing: Timing, *, can_replay: bool) -> None:
        self.rank = rank
        self.connected = False
        self.frames = self.events = self.blocks = 0
        self.gaps = self.replays = self.replays_failed = self.restarts = self.cleared = 0
        self.malformed = self.skipped = 0
        self.last_event_s: float | None = None
        self._owner = owner
        self._clock = clock
        self._timing = timing
        self._can_replay = can_replay
        self._next: int | None = None
        """The number that comes next; None while the stream is not known."""
        self._last = 0
        """Hash of the last message's payload."""
        self._last_ts = float("-inf")
        """And the engine's time in it."""
        self._overlaps = False
        """A replay has just ended: what it brought may come again."""
        self._replay: _Replay | None = None
        self._held: deque[tuple[int, bytes]] = deque()
        self._held_bytes = 0
        self._cool_until_s = float("-inf")

    @property
    def live(self) -> bool:
        return self.connected and self._replay is None

    # -- what happens to it

    def connection(self, up: bool) -> None:
        """To the engine: up, for the first time or again, so that messages may have been missed; or ended."""
        self.connected = up
        if up and self._can_replay:
            self._cool_until_s = float("-inf")
            self._ask()

    def begin(self) -> None:
        """The engine sends its messages to us, sooner or later: what it has told already is asked for."""
        if self._may_ask():
            self._ask()

    def begin_again(self) -> None:
        """Nothing is known of the stream any more."""
        self._next = None
        self._last_ts = float("-inf")
        self._overlaps = False
        self._held.clear()
        self._held_bytes = 0
        if self._may_ask() and self.connected:
            self._ask()
        elif self._replay:
            self._end_replay()

    def refill(self) -> None:
        """What is known of the endpoint was thrown away: what can be had again is asked for."""
        if self._may_ask():
            self.begin_again()

    def take(self, parts: Sequence[bytes]) -> None:
        """A message of the live stream: topic, number, payload."""
        if len(parts) != 3 or not _is_text(parts[0]):
            self.malformed += 1
        elif (number := self._number(parts[1])) is not None:
            self._arrive(number, parts[2])

    def replayed(self, parts: Sequence[bytes]) -> None:
        """A message of the answer to a replay: number and payload, after an empty part, a topic or both."""
        replay = self._replay
        if replay is None:
            return
        if not 2 <= len(parts) <= 4:
            self.malformed += 1
            return
        *_, seq, payload = parts
        if (number := self._number(seq)) is None:
            return
        replay.heard_s = self._clock()
        replay.retry_at_s = None
        if number == END:
            self._answered(replay)
        elif replay.first:
            self._begin(replay, number, payload)
        elif number == self._next:
            self._apply(number, payload)
        elif self._next is not None and number > self._next:
            replay.hole = True

    def tick(self) -> None:
        """Time has passed."""
        replay, now, timing = self._replay, self._clock(), self._timing
        if replay is None:
            return
        if replay.retry_at_s is not None:
            if now >= replay.retry_at_s:
                replay.retry_at_s, replay.heard_s = None, now
                replay.attempts += 1
                self._send(replay)
        elif now - replay.began_s > timing.total_s or (
            now - replay.heard_s > timing.idle_s and replay.attempts > 1
        ):
            self._failed()
        elif now - replay.heard_s > timing.idle_s:
            replay.retry_at_s = now + timing.retry_s

    def snapshot(self, endpoint: str, address: str, replay: str) -> KvEventSource:
        return KvEventSource(
            endpoint=endpoint,
            rank=self.rank,
            address=address,
            replay=replay,
            connected=self.connected,
            live=self.live,
            frames=self.frames,
            events=self.events,
            blocks=self.blocks,
            last_event_s=self.last_event_s,
            gaps=self.gaps,
            replays=self.replays,
            replays_failed=self.replays_failed,
            restarts=self.restarts,
            cleared=self.cleared,
            malformed=self.malformed,
            skipped=self.skipped,
        )

    # -- the live stream

    def _number(self, seq: bytes) -> int | None:
        if len(seq) == SEQ_BYTES:
            return int.from_bytes(seq, "big")
        self.malformed += 1
        return None

    def _arrive(self, number: int, payload: bytes) -> None:
        self.connected = True
        if self._replay is None and self._next is None and self._may_ask():
            self._ask()
        if self._replay:
            self._hold(number, payload)
        else:
            self._take(number, payload, may_ask=True)

    def _hold(self, number: int, payload: bytes) -> None:
        if len(self._held) < HELD_FRAMES and self._held_bytes + len(payload) <= HELD_BYTES:
            self._held.append((number, payload))
            self._held_bytes += len(payload)

    def _take(self, number: int, payload: bytes, *, may_ask: bool) -> None:
        expected = self._next
        if expected is None:
            self._start(number, payload)
        elif number == expected:
            self._overlaps = False
            self._apply(number, payload)
        elif number > expected:
            self.gaps += may_ask  # else the replay of this very gap did not fill it
            if may_ask and self._may_ask():
                self._hold(number, payload)
                self._ask()
                return
            self._lost()
            self._overlaps = False
            self._apply(number, payload)
        elif not (self._overlaps and self._seen(payload)):
            self.restarts += 1
            self._owner.restarted(self)
            self._arrive(number, payload)

    def _start(self, number: int, payload: bytes) -> None:
        """The first message that is known of this stream."""
        self._overlaps = False
        if number:
            self._owner.begun_late()
        self._apply(number, payload)

    def _seen(self, payload: bytes) -> bool:
        """A message with a number that has been is one that the replay brought; or one that is none."""
        try:
            return decode(payload).ts <= self._last_ts
        except MalformedFrame:
            self.malformed += 1
            return True

    def _apply(self, number: int, payload: bytes) -> None:
        self._next = number + 1
        self._last = xxh3_64_intdigest(payload)
        try:
            batch = decode(payload)
        except MalformedFrame as exc:
            self.malformed += 1
            log.debug("a message of KV events is skipped: %s", exc)
            return
        self._last_ts = batch.ts
        self._count(batch)
        self._owner.apply(batch.events)

    def _count(self, batch: Batch) -> None:
        self.frames += 1
        self.events += len(batch.events)
        self.skipped += batch.skipped
        self.last_event_s = self._clock()
        for event in batch.events:
            if isinstance(event, Stored | Removed):
                self.blocks += len(event.hashes)

    def _lost(self) -> None:
        self.cleared += 1
        self._owner.lost(self)

    # -- replays

    def _may_ask(self) -> bool:
        return self._can_replay and self._clock() >= self._cool_until_s

    def _ask(self) -> None:
        self._replay = _Replay(self._clock())
        self._send(self._replay)

    def _send(self, replay: _Replay) -> None:
        """Ask for the last message that is known and all after it, or for all there is."""
        replay.first = True
        replay.hole = False
        replay.start = max((self._next or 0) - 1, 0)
        self._owner.replay(self, replay.start)

    def _begin(self, replay: _Replay, number: int, payload: bytes) -> None:
        """The first message of an answer says whether it goes on from what we have."""
        if number < replay.start:
            return  # an engine that sends all it has
        replay.first = False
        if self._next is None:
            self._start(number, payload)
        elif number == self._next - 1:
            if xxh3_64_intdigest(payload) != self._last:
                self._other_engine()
        else:  # the engine no longer has what we miss
            self._lost()
            self._apply(number, payload)

    def _other_engine(self) -> None:
        self.restarts += 1
        self._owner.restarted(self)

    def _answered(self, replay: _Replay) -> None:
        if replay.first and self._next:
            self._other_engine()  # it does not have the last message we had from it
        elif replay.hole and self._next is not None and self._next - 1 > replay.start:
            self._send(replay)
        elif replay.hole:
            self._failed()
        else:
            self.replays += 1
            self._catch_up()

    def _failed(self) -> None:
        self.replays_failed += 1
        self._cool_until_s = self._clock() + self._timing.cooldown_s
        self._catch_up()

    def _catch_up(self) -> None:
        """Go on with what came meanwhile."""
        self._end_replay()
        self._overlaps = True
        held, self._held = self._held, deque()
        self._held_bytes = 0
        for number, payload in held:
            if self._replay:  # among these the engine has begun anew
                self._hold(number, payload)
            else:
                self._take(number, payload, may_ask=False)

    def _end_replay(self) -> None:
        self._replay = None
        self._owner.replay_ended(self)


def _is_text(topic: bytes) -> bool:
    try:
        topic.decode()
    except UnicodeDecodeError:
        return False
    return True
