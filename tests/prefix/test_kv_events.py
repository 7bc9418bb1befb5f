"""KV events over real ZeroMQ sockets on loopback: who publishes where, and what the index is told."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from pointsman.config import Endpoint as EndpointSettings
from pointsman.config import KvEvents as Settings
from pointsman.endpoints.pool import Pool
from pointsman.endpoints.target import targets_of
from pointsman.errors import SettingsError
from pointsman.prefix.kv_events import KvEvents
from pointsman.prefix.kv_socket import MAX_FRAME_BYTES
from pointsman.prefix.kv_source import KvEventSource, Timing
from pointsman.prefix.kv_wire import Cleared, Event, Removed, Stored
from pointsman.testing.kv_publisher import CLEARED, Publisher, batch, removed, stored
from pointsman.testing.upstream import FakeUpstream

CAPTURE = Path(__file__).parent / "capture"
PATIENCE_S = 10.0


class Index:
    """What a sink is told, kept as plain sets by slot."""

    def __init__(self) -> None:
        self.held: dict[int, set[int]] = {}
        self.log: list[Event] = []
        self.clears = 0
        self.partial: set[int] = set()
        self._changed = asyncio.Event()

    def add(self, slot: int) -> None:
        assert slot not in self.held
        self.held[slot] = set()

    def remove(self, slot: int) -> None:
        del self.held[slot]
        self._changed.set()

    def clear(self, slot: int) -> None:
        self.held[slot].clear()
        self.clears += 1
        self._changed.set()

    def missed(self, slot: int) -> None:
        self.held[slot].clear()
        self.partial.add(slot)

    def apply(self, slot: int, events: Sequence[Event], now_s: float) -> None:
        held = self.held[slot]
        for event in events:
            if isinstance(event, Stored):
                held.update(event.hashes)
            elif isinstance(event, Removed):
                held.difference_update(event.hashes)
            else:
                held.clear()
        self.log += events
        self._changed.set()

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not holds():
                self._changed.clear()
                await self._changed.wait()


def page(*publishers: Publisher, **fields: Any) -> dict[str, Any]:
    """What vLLM 0.32 says at /kv_event_sources, by rank, each with ports of its own."""
    return {
        str(rank): {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": p.address.replace("127.0.0.1", "*"),
            "replay_endpoint": p.replay,
            "topic": p.topic.decode(),
            **fields,
        }
        for rank, p in enumerate(publishers)
    }


@asynccontextmanager
async def engine_saying(tree: object) -> AsyncIterator[FakeUpstream]:
    """Its answer to GET /kv_event_sources; None: 404."""
    async with FakeUpstream() as upstream:
        if tree is not None:
            upstream.kv_event_sources = json.dumps(tree).encode()
        yield upstream
        assert {probe.target for probe in upstream.probes} <= {"/kv_event_sources"}
        assert upstream.requests == []


class Intake:
    """KV events of a pool, running."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, **settings: Any) -> None:
        self.pool = Pool(clock)
        self.index = Index()
        self.events = KvEvents(self.pool, Settings(**settings), self.index, clock, Timing())

    async def __aenter__(self) -> Intake:
        self.events.start()
        self._task = asyncio.create_task(self.events.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def join(self, url: str, name: str = "") -> int:
        """Slot of a new endpoint."""
        [target] = targets_of(EndpointSettings(url=url, name=name))
        slot = self.pool.add(target, "test").endpoint.slot
        self.events.tick()
        return slot

    def source(self) -> KvEventSource:
        [source] = self.events.sources()
        return source


async def test_an_engine_that_says_where_it_publishes_is_followed_from_its_first_event() -> None:
    async with Publisher() as engine, engine_saying(page(engine)) as upstream, Intake() as intake:
        engine.publish(stored([1, 2]))
        engine.publish(stored([3], parent=2))
        slot = intake.join(upstream.url)
        await intake.index.until(lambda: intake.index.held == {slot: {1, 2, 3}})
        engine.publish(removed(1), stored([4]))
        await intake.index.until(lambda: intake.index.held[slot] == {2, 3, 4})
        source = intake.source()
        assert (source.endpoint, source.rank, source.address) == (upstream.name, 0, engine.address)
        assert (source.frames, source.events, source.blocks) == (3, 4, 5)
        assert source.connected
        assert source.live
        assert source.last_event_s is not None
        assert source.last_event_s <= time.monotonic()
        assert engine.asked == [0]


async def test_messages_lost_on_the_way_are_had_again() -> None:
    async with Publisher() as engine, engine_saying(page(engine)) as upstream, Intake() as intake:
        engine.topic_in_replays = False
        slot = intake.join(upstream.url)
        engine.publish(stored([1]))
        await intake.index.until(lambda: intake.index.held == {slot: {1}})
        engine.lose(stored([2]), removed(1))
        engine.lose(stored([3]))
        engine.publish(stored([4]))
        await intake.index.until(lambda: intake.index.held == {slot: {2, 3, 4}})
        assert (intake.source().gaps, intake.source().cleared, intake.index.clears) == (1, 0, 0)


async def test_without_replays_a_gap_empties_what_the_index_has_of_the_endpoint() -> None:
    async with (
        Publisher() as engine,
        Publisher() as other,
        engine_saying(page(engine, replay_endpoint=None)) as upstream,
        engine_saying(page(other, replay_endpoint=None)) as second,
        Intake() as intake,
    ):
        slot, untouched = intake.join(upstream.url), intake.join(second.url)
        await engine.subscribed()
        await other.subscribed()
        engine.publish(stored([1]))
        other.publish(stored([7]))
        await intake.index.until(lambda: intake.index.held == {slot: {1}, untouched: {7}})
        engine.lose(removed(1))
        engine.publish(stored([2]))
        await intake.index.until(lambda: intake.index.held == {slot: {2}, untouched: {7}})
        assert sum(source.cleared for source in intake.events.sources()) == 1
        assert intake.index.partial == {slot}


async def test_an_engine_that_starts_anew_is_known_anew() -> None:
    async with Publisher() as engine, engine_saying(page(engine)) as upstream, Intake() as intake:
        engine.publish(stored([1, 2, 3]))
        slot = intake.join(upstream.url)
        await intake.index.until(lambda: intake.index.held == {slot: {1, 2, 3}})
        engine.restart()
        engine.publish(stored([9]))
        await intake.index.until(lambda: intake.index.held == {slot: {9}})
        assert (intake.source().restarts, intake.source().cleared) == (1, 0)


async def test_an_engine_that_comes_back_at_its_address_is_followed_again() -> None:
    async with engine_saying(None) as upstream, Intake() as intake:
        async with Publisher() as engine:
            upstream.kv_event_sources = json.dumps(page(engine)).encode()
            slot = intake.join(upstream.url)
            engine.publish(stored([1, 2]))
            await intake.index.until(lambda: intake.index.held == {slot: {1, 2}})
        async with Publisher(at=engine.address, replay_at=engine.replay) as again:
            again.publish(stored([5]))
            await intake.index.until(lambda: intake.index.held == {slot: {5}})
            assert intake.source().restarts == 1


async def test_the_pool_telling_of_a_restart_has_everything_asked_again() -> None:
    async with Publisher() as engine, engine_saying(page(engine)) as upstream, Intake() as intake:
        engine.publish(stored([1]))
        slot = intake.join(upstream.url)
        await intake.index.until(lambda: intake.index.held == {slot: {1}})
        intake.pool.reached(upstream.name)
        intake.pool.unreachable(upstream.name)
        assert intake.index.held == {slot: set()}
        await intake.index.until(lambda: intake.index.held == {slot: {1}})
        assert engine.asked == [0, 0]


async def test_every_data_parallel_rank_is_a_source_of_its_own() -> None:
    async with (
        Publisher() as zero,
        Publisher() as one,
        engine_saying(page(zero, one)) as upstream,
        Intake() as intake,
    ):
        zero.publish(stored([1]))
        one.publish(stored([2]))
        slot = intake.join(upstream.url)
        await intake.index.until(lambda: intake.index.held == {slot: {1, 2}})
        one.restart()
        one.publish(stored([3]))
        await intake.index.until(lambda: intake.index.held == {slot: {1, 3}})
        assert {(s.rank, s.address, s.restarts) for s in intake.events.sources()} == {
            (0, zero.address, 0),
            (1, one.address, 1),
        }


async def test_an_endpoint_that_leaves_is_forgotten_and_its_sockets_are_closed() -> None:
    async with Publisher() as engine, engine_saying(page(engine)) as upstream, Intake() as intake:
        engine.publish(stored([1]))
        slot = intake.join(upstream.url)
        await intake.index.until(lambda: intake.index.held == {slot: {1}})
        intake.pool.remove(upstream.name)
        assert intake.index.held == {}
        assert intake.events.sources() == []
        engine.publish(stored([2]))
        again = intake.join(upstream.url)
        await intake.index.until(lambda: intake.index.held == {again: {1, 2}})


@pytest.mark.parametrize("tree", [{}, None, "nonsense"])
async def test_an_engine_without_events_has_no_sources(tree: object) -> None:
    async with engine_saying(tree) as upstream, Intake() as intake:
        intake.join(upstream.url)
        [followed] = intake.events._followed.values()
        assert followed.asking
        await followed.asking
        assert len(upstream.probes) == 1
        assert intake.events.sources() == []
        intake.events.tick()
        assert followed.asking is None


async def test_an_engine_that_does_not_say_is_listened_to_where_the_settings_say() -> None:
    async with Publisher() as engine, engine_saying(None) as upstream:
        port, replay_port = (int(address.rpartition(":")[2]) for address in (engine.address, engine.replay))
        async with Intake(mode="all", port=port, replay_port=replay_port) as intake:
            engine.publish(stored([1]))
            slot = intake.join(upstream.url)
            await intake.index.until(lambda: intake.index.held == {slot: {1}})


async def test_engines_that_connect_to_us_are_told_apart_by_their_topics() -> None:
    [port] = free_ports(1)
    bind = f"tcp://127.0.0.1:{port}"
    async with engine_saying(None) as first, Intake(bind=bind) as intake:
        slot = intake.join(first.url)
        named = intake.join("http://127.0.0.2:9", name="pod-7")
        async with (
            Publisher(f"kv@{first.name}@org/model@v2", connect=bind) as a,
            Publisher("kv@pod-7@m", connect=bind) as b,
            Publisher("kv@somebody-else@m", connect=bind) as c,
            Publisher("unlike", connect=bind) as d,
        ):
            for engine in (a, b, c):
                await engine.subscribed()
            d.publish(stored([99]))
            c.publish(stored([3]))
            a.publish(stored([1]))
            b.publish(stored([2]), rank=1)
            await intake.index.until(lambda: intake.index.held == {slot: {1}, named: {2}})
            assert {(s.endpoint, s.rank) for s in intake.events.sources()} == {(first.name, 0), ("pod-7", 1)}
            while intake.events.unknown == 0:
                c.publish(stored([3]))
                await asyncio.sleep(0)
            assert intake.index.held == {slot: {1}, named: {2}}


async def test_an_engine_that_connects_to_us_is_asked_for_what_was_missed() -> None:
    [port] = free_ports(1)
    bind = f"tcp://127.0.0.1:{port}"
    async with Publisher(connect=bind) as engine:
        told = page(engine, endpoint=bind)
        async with engine_saying(told) as upstream, Intake(bind=bind) as intake:
            engine.topic = f"kv@{upstream.name}@m".encode()
            slot = intake.join(upstream.url)
            await engine.subscribed()
            engine.lose(stored([1]))
            engine.publish(stored([2]))
            await intake.index.until(lambda: intake.index.held == {slot: {1, 2}})
            assert set(engine.asked) == {0}


async def test_an_engine_that_connects_to_us_is_asked_at_once_for_what_it_told_before() -> None:
    """It may say nothing for long: what it holds is known to whoever asks."""
    [port] = free_ports(1)
    bind = f"tcp://127.0.0.1:{port}"
    async with Publisher(connect=bind) as engine:
        engine.lose(stored([1]))
        async with engine_saying(page(engine, endpoint=bind)) as upstream, Intake(bind=bind) as intake:
            slot = intake.join(upstream.url)
            await intake.index.until(lambda: intake.index.held == {slot: {1}})
            engine.topic = f"kv@{upstream.name}@m".encode()
            await engine.subscribed()
            engine.publish(stored([2]))
            await intake.index.until(lambda: intake.index.held == {slot: {1, 2}})
            assert engine.asked == [0]


async def test_hostile_messages_are_counted_and_the_next_good_one_is_taken() -> None:
    async with (
        Publisher() as engine,
        engine_saying(page(engine, replay_endpoint=None, topic="")) as upstream,
        Intake() as intake,
    ):
        slot = intake.join(upstream.url)
        await engine.subscribed()
        engine.publish(stored([1]))
        for payload in (b"", b"\xc1", b"\x91" * 100_000, b"\xdd\xff\xff\xff\xff", batch(7, [], {})[:-1]):
            engine.send(payload)
        engine.send_parts(b"kv@e@m")
        engine.send_parts(b"kv@e@m", b"1234567", b"")
        engine.send_parts(b"\xff\xfe", (6).to_bytes(8, "big"), batch(CLEARED))
        engine.send_parts(*[b"x"] * 1000)
        engine.publish({"type": "Unheard"}, stored([2]))
        await intake.index.until(lambda: intake.index.held == {slot: {1, 2}})
        assert (intake.source().malformed, intake.source().skipped) == (9, 1)


async def test_a_part_that_is_too_large_costs_the_connection_and_nothing_else() -> None:
    async with Publisher() as engine, engine_saying(page(engine)) as upstream, Intake() as intake:
        slot = intake.join(upstream.url)
        engine.publish(stored([1]))
        await intake.index.until(lambda: intake.index.held == {slot: {1}})
        engine.send_parts(engine.topic, bytes(8), bytes(MAX_FRAME_BYTES + 1))
        engine.publish(stored([2]))
        await intake.index.until(lambda: intake.index.held == {slot: {1, 2}})
        assert engine.asked == [0, 0]


async def test_the_capture_of_a_real_engine_is_taken_whole_although_messages_are_lost() -> None:
    text = gzip.decompress((CAPTURE / "frames.jsonl.gz").read_bytes())
    payloads = [base64.b64decode(json.loads(line)["frames_b64"][2]) for line in text.splitlines()]
    async with Publisher() as engine, engine_saying(page(engine)) as upstream, Intake() as intake:
        intake.join(upstream.url)
        await engine.subscribed()
        for i, payload in enumerate(payloads):
            if i % 10 == 5:
                engine._buffer.append((engine._seq, payload))
                engine._seq += 1
            else:
                engine.send(payload)
        log = intake.index.log
        await intake.index.until(lambda: len(log) == 1384)
        assert sum(isinstance(event, Cleared) for event in log) == 2
        assert sum(len(event.hashes) for event in log if isinstance(event, Stored)) == 1544
        assert sum(len(event.hashes) for event in log if isinstance(event, Removed)) == 1149
        assert (intake.source().frames, intake.source().cleared) == (235, 0)
        assert intake.index.clears == 0


async def test_an_address_that_is_taken_ends_the_start() -> None:
    async with Publisher() as engine:
        with pytest.raises(SettingsError, match=r"kv_events\.bind: cannot listen at tcp"):
            async with Intake(bind=engine.address):
                pass


@pytest.mark.parametrize("bind", ["*:5557", "ipc:///tmp/x", "tcp://*"])
async def test_an_address_that_is_none_is_named(bind: str) -> None:
    with pytest.raises(SettingsError, match=r"kv_events\.bind: .*write it as"):
        Intake(bind=bind).events.start()


async def test_off_means_that_nobody_is_asked() -> None:
    async with FakeUpstream() as upstream, Intake(mode="none") as intake:
        intake.join(upstream.url)
        intake.events.tick()
        assert intake.events._followed == {}
        assert intake.events.sources() == []
        assert upstream.probes == []


@pytest.fixture
def no_pyzmq(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an install without the extra."""
    monkeypatch.delitem(sys.modules, "pointsman.prefix.kv_socket")
    monkeypatch.setitem(sys.modules, "zmq", None)  # type: ignore[arg-type] - what Python keeps for "there is none"


@pytest.mark.parametrize("settings", [{"mode": "all"}, {"bind": "tcp://*:5557"}])
@pytest.mark.usefixtures("no_pyzmq")
async def test_who_wants_events_without_pyzmq_is_told_what_to_install(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=r"kv_events: .*pip install 'pointsman\[kv-events\]'"):
        Intake(**settings)


@pytest.mark.usefixtures("no_pyzmq")
async def test_who_did_not_ask_for_events_does_without_pyzmq() -> None:
    async with engine_saying({}) as upstream, Intake() as intake:
        intake.join(upstream.url)
        assert intake.events.sources() == []
    assert upstream.probes == []


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
