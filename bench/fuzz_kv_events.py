"""Hostile KV events for a while: no message may crash the intake, stall it or make it grow.

    python -m bench.fuzz_kv_events --minutes 10

Half of the time Hypothesis makes up streams for a source and the index behind it: messages of every layout,
damaged ones, nonsense, lies about lengths, nesting, numbers out of order, answers nobody asked for, while
connections come and go. The other half such messages come over real sockets, and after each burst a good one
must still be taken. Exit code 1 when a law was broken; what broke it is printed.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import resource
import sys
import time
from collections.abc import Callable, Sequence

import msgspec
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from pointsman.prefix.kv_addresses import SourceAddress
from pointsman.prefix.kv_feed import Feed
from pointsman.prefix.kv_socket import ZmqSockets
from pointsman.prefix.kv_source import END, HELD_BYTES, HELD_FRAMES, SEQ_BYTES, Source, Timing
from pointsman.prefix.kv_wire import Event
from pointsman.prefix.precise import PreciseIndex
from pointsman.testing.kv_publisher import CLEARED, Publisher, batch, removed, stored

INDEX_BYTES = 8 * 1024 * 1024
STALL_S = 1.0
"""The longest that one message of a few kilobytes may take, on a machine that does other things as well."""
GROWTH_BYTES = 96 * 1024 * 1024
"""Of the process from its second round on: Hypothesis itself takes some."""
PATIENCE_S = 20.0
BURST = 40

# -- what comes

_words = st.sampled_from(
    [
        "BlockStored",
        "BlockRemoved",
        "AllBlocksCleared",
        "type",
        "block_hashes",
        "token_ids",
        "GPU",
        "ts",
        "events",
    ]
)
_leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats()
    | st.binary(max_size=40)
    | st.text(max_size=8)
    | _words
)
trees = st.recursive(
    _leaves, lambda x: st.lists(x, max_size=6) | st.dictionaries(_words, x, max_size=5), max_leaves=40
)
_hashes = st.lists(st.integers(0, 40), max_size=8)


@st.composite
def good_events(draw: st.DrawFn) -> object:
    """Of vLLM's maps or the arrays of others, over so few blocks that they meet again."""
    hashes = draw(_hashes)
    event = draw(
        st.sampled_from(
            [
                stored(
                    hashes, draw(st.none() | st.integers(0, 40)), medium=draw(st.sampled_from(["GPU", "cpu"]))
                ),
                stored(hashes, token_ids=[], medium="CPU"),
                removed(*hashes),
                CLEARED,
            ]
        )
    )
    assert isinstance(event, dict)
    return list(event.values()) if draw(st.booleans()) else event


good = st.builds(
    lambda events, ts, rank: batch(*events, ts=ts, rank=rank),
    st.lists(good_events(), max_size=6),
    st.floats(0, 100),
    st.none() | st.integers(-2, 300),
)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A good one with bytes changed, left out or put in, or cut off."""
    payload = bytearray(draw(good))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(payload)))
        payload[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=5))
    return bytes(payload[: draw(st.integers(0, len(payload)))] if draw(st.booleans()) else payload)


liars = st.builds(
    lambda before, mark, count, after: before + mark + count.to_bytes(4, "big") + after,
    st.sampled_from(
        [b"", b"\x93\x00", b"\x93\x00\x91", b"\x92\x00\x91\x82\xa4type\xabBlockStored\xacblock_hashes"]
    ),
    st.sampled_from([b"\xdd", b"\xdf", b"\xc6", b"\xdb", b"\xc9"]),
    st.integers(0, (1 << 32) - 1),
    st.binary(max_size=20),
)
deep = st.builds(
    lambda before, mark, times: before + mark * times,
    st.sampled_from([b"", b"\x93\x00\x91", b"\x93\x00\x91\x9a\xabBlockStored"]),
    st.sampled_from([b"\x91", b"\x81\xa1a", b"\x81", b"\x92\xc0"]),
    st.integers(1, 20_000),
)
payloads = st.one_of(
    good,
    good,
    damaged(),
    liars,
    deep,
    st.binary(max_size=200),
    trees.map(msgspec.msgpack.encode),
    st.lists(trees, max_size=5).map(lambda events: msgspec.msgpack.encode([0.0, events, 0])),
)
numbers = st.one_of(st.integers(0, 12), st.sampled_from([END, END - 1, 1 << 63]), st.integers(0, END)).map(
    lambda n: n.to_bytes(SEQ_BYTES, "big")
)
parts = st.one_of(
    st.tuples(st.sampled_from([b"", b"kv@e@m", b"\xff"]), numbers, payloads),
    st.tuples(st.just(b""), st.just(b""), st.just(END.to_bytes(8, "big")), st.just(b"")),
    st.tuples(st.just(b""), numbers, payloads),
    st.lists(st.binary(max_size=12), max_size=6),
)
steps = st.one_of(
    st.tuples(st.just("live"), parts),
    st.tuples(st.just("live"), parts),
    st.tuples(st.just("replayed"), parts),
    st.tuples(st.just("connection"), st.booleans()),
    st.tuples(st.just("passes"), st.sampled_from([0.1, 3.0, 6.0, 200.0])),
)


# -- who takes it


class Rig:
    """A source with an index behind it, and what must hold of them after every step."""

    def __init__(self, *, can_replay: bool) -> None:
        self.now = 0.0
        self.index = PreciseIndex(max_bytes=INDEX_BYTES)
        self.index.add(0)
        self.source = Source(0, self, lambda: self.now, Timing(), can_replay=can_replay)

    def apply(self, events: Sequence[Event]) -> None:
        self.index.apply(0, events, self.now)

    def begun_late(self) -> None:
        self.index.missed(0)

    def lost(self, source: Source) -> None:
        self.index.missed(0)

    def restarted(self, source: Source) -> None:
        self.index.clear(0)
        source.begin_again()

    def replay(self, source: Source, start: int) -> None:
        assert 0 <= start <= END

    def replay_ended(self, source: Source) -> None:
        pass

    def step(self, kind: str, value: object) -> None:
        began = time.perf_counter()
        if kind == "passes":
            assert isinstance(value, float)
            self.now += value
            self.source.tick()
        else:
            takes: dict[str, Callable[[object], None]] = {
                "live": self.source.take,  # type: ignore[dict-item] - made up to fit
                "replayed": self.source.replayed,  # type: ignore[dict-item]
                "connection": self.source.connection,  # type: ignore[dict-item]
            }
            takes[kind](value)
        took = time.perf_counter() - began
        assert took < STALL_S, f"one step took {took:.2f} s"
        assert len(self.source._held) <= HELD_FRAMES
        assert self.source._held_bytes <= HELD_BYTES
        assert self.index.used_bytes <= INDEX_BYTES


def stream(can_replay: bool, story: Sequence[tuple[str, object]]) -> None:
    """Everything in ``story``, and then a stream that is as it should be: it must be taken."""
    rig = Rig(can_replay=can_replay)
    for kind, value in story:
        rig.step(kind, value)
    rig.source.begin_again()
    rig.step("passes", 500.0)
    rig.step("passes", 500.0)
    before = rig.source.events
    rig.step("live", (b"kv@e@m", bytes(8), batch(stored([1], block=16))))
    if rig.source._replay:
        rig.step("replayed", (b"", b"", END.to_bytes(8, "big"), b""))
    assert rig.source.events == before + 1
    assert rig.source._replay is None


def streams(examples: int, number: int) -> None:
    """Hypothesis' part: so many streams, others for each number."""
    run = given(st.booleans(), st.lists(steps, max_size=30))(stream)
    run = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )(run)
    seed(number)(run)()


async def over_sockets(seconds: float, rng: random.Random) -> int:
    """The sockets' part; returns how many messages came."""
    sockets, index, count = ZmqSockets(), PreciseIndex(max_bytes=INDEX_BYTES), 0
    until = time.monotonic() + seconds
    async with Publisher() as engine:
        feed = Feed("e", 0, index, sockets, time.monotonic, Timing())
        feed.publishes_at([SourceAddress(0, engine.address, engine.replay, "")])
        try:
            while time.monotonic() < until:
                await engine.subscribed()
                for made in _examples(rng):
                    if rng.random() < 0.5:
                        engine.send_parts(*made)
                    else:
                        engine.send(made[-1])
                    count += 1
                if rng.random() < 0.1:
                    engine.restart()
                await _still_takes(engine, feed)
        finally:
            feed.leave()
            sockets.close()
    return count


async def _still_takes(engine: Publisher, feed: Feed) -> None:
    """Good messages go on being published until one is taken after the hostile ones."""
    [before] = feed.sources()
    async with asyncio.timeout(PATIENCE_S):
        while next(iter(feed.sources())).events <= before.events:
            engine.publish(stored([1], block=16))
            feed.tick()
            await asyncio.sleep(0.002)


def _examples(rng: random.Random) -> list[Sequence[bytes]]:
    """A burst of made-up messages of at least one part."""
    made: list[Sequence[bytes]] = []

    @seed(rng.getrandbits(32))
    @settings(
        max_examples=BURST, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(parts)
    def collect(example: Sequence[bytes]) -> None:
        if example:
            made.append(example)

    collect()
    return made


def rss_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="bench.fuzz_kv_events", description="Hostile KV events for a while."
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="default: 10")
    parser.add_argument("--seed", type=int, default=1, help="default: 1")
    args = parser.parse_args()
    logging.disable()
    half_s, rounds, base = args.minutes * 30, 0, 0
    rng = random.Random(args.seed)
    began = time.monotonic()
    while time.monotonic() - began < half_s:
        streams(200, rng.getrandbits(32))
        rounds += 1
        if rounds == 2:
            base = rss_bytes()
        growth = rss_bytes() - base if base else 0
        print(
            f"{time.monotonic() - began:6.0f} s  {rounds * 200:,} streams  grown by {growth >> 20} MiB",
            flush=True,
        )
        if growth > GROWTH_BYTES:
            print("FAILED: memory grows", file=sys.stderr)
            return 1
    count = asyncio.run(over_sockets(half_s, rng))
    growth = rss_bytes() - base if base else 0
    print(f"{count:,} messages over sockets  grown by {growth >> 20} MiB")
    if growth > GROWTH_BYTES:
        print("FAILED: memory grows", file=sys.stderr)
        return 1
    print("passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
