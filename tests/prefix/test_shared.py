"""A block index that routers share, in a server that speaks Redis: a fake one always, a real one where it
is.
"""

from __future__ import annotations

import asyncio
import shutil
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import fakeredis
import msgspec
import pytest
import redis.asyncio
from redis.exceptions import ConnectionError as Away

from pointsman.config import Endpoint
from pointsman.endpoints.pool import Pool
from pointsman.endpoints.target import targets_of
from pointsman.errors import SettingsError
from pointsman.prefix.blocks_match import BlockMatch
from pointsman.prefix.blocks_schemes import LlmD
from pointsman.prefix.keys import Scheme
from pointsman.prefix.kv_wire import Cleared, Event, Removed, Stored
from pointsman.prefix.precise import PreciseIndex
from pointsman.prefix.shared import BATCH, FRESH_S, MAX_QUEUED, SharedIndex, connect
from pointsman.prefix.shared_blocks import SharedBlocks
from pointsman.prefix.shared_layout import pairs
from pointsman.testing import request
from pointsman.types import InferenceRequest, Tokenized

SERVER = shutil.which("redis-server") or shutil.which("valkey-server")
IDS = list(range(500, 596))
"""Six blocks of 16."""
A, B = "10.0.0.1:8000", "10.0.0.2:8000"


def pack(ids: list[int]) -> bytes:
    return array("I", ids).tobytes()


def ask(ids: list[int] = IDS, **fields: Any) -> InferenceRequest:
    return request(tokenized=(Tokenized(pack([*ids, 1])),), **fields)


def stored(first: int, end: int, size: int = 16, **fields: Any) -> Stored:
    """The engine's hashes are where its blocks end; ``first`` and ``end`` count tokens."""
    return Stored(
        [7000 + at + size for at in range(first, end, size)],
        7000 + first if first else None,
        pack(IDS[first:end]),
        size,
        **fields,
    )


@pytest.fixture(
    params=["fake", pytest.param("real", marks=pytest.mark.skipif(not SERVER, reason="needs redis-server"))]
)
async def client(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[redis.asyncio.Redis]:
    if request.param == "fake":
        fake = fakeredis.FakeAsyncRedis()
        yield fake
        await fake.aclose()
        return
    socket = tmp_path / "s"
    assert SERVER
    process = await asyncio.create_subprocess_exec(
        *(SERVER, "--port", "0", "--unixsocket", str(socket), "--save", "", "--dir", str(tmp_path)),
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout
    while b"accept connections" not in await process.stdout.readline():
        pass
    client = connect(f"unix://{socket}")
    yield client
    await client.aclose()
    process.terminate()
    await process.communicate()


class Pair:
    """Two routers that share an index; both know both endpoints."""

    def __init__(self, client: redis.asyncio.Redis, algorithm: str = "xxh64") -> None:
        self.client = client
        self.one, self.other = (SharedIndex(client, LlmD(algorithm)) for _ in range(2))
        for index, slots in ((self.one, (0, 1)), (self.other, (5, 3))):
            for slot, address in zip(slots, (A, B), strict=True):
                index.add(slot, address, "m")

    async def tell(self, index: SharedIndex, slot: int, *events: Event) -> None:
        """Everything has been written when this returns."""
        index.apply(slot, events, 0.0)
        task = asyncio.create_task(index.run())
        await index.drain()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def found(self, index: SharedIndex, asked: InferenceRequest, now_s: float) -> dict[int, int]:
        keys = index.keys(asked)
        assert await index.fetch(keys, now_s)
        return index.match(asked, now_s, keys).tokens_by_slot


@pytest.fixture
def both(client: redis.asyncio.Redis) -> Pair:
    return Pair(client)


async def test_what_one_router_is_told_the_other_knows(both: Pair) -> None:
    await both.tell(both.one, 0, stored(0, 48), stored(48, 96))
    await both.tell(both.one, 1, stored(0, 32))
    assert await both.found(both.other, ask(), 0.0) == {5: 96, 3: 32}
    assert await both.found(both.one, ask(), 0.0) == {0: 96, 1: 32}
    assert await both.found(both.other, ask(cache_salt="s"), 0.0) == {}
    assert await both.found(both.other, ask(model="else"), 0.0) == {}


async def test_what_is_taken_out_is_gone_for_both(both: Pair) -> None:
    await both.tell(both.one, 0, stored(0, 96))
    await both.tell(both.other, 5, Removed([7064], group=0), Removed([123], group=0))
    assert await both.found(both.one, ask(), 0.0) == {0: 48}
    await both.tell(both.other, 5, stored(48, 64))
    assert await both.found(both.one, ask(), FRESH_S) == {0: 96}
    await both.tell(both.one, 1, stored(0, 32))
    await both.tell(both.one, 0, Cleared())
    assert await both.found(both.other, ask(), 9.0) == {3: 32}


@pytest.mark.parametrize("size", [8, 16, 32, 96])
async def test_engines_blocks_may_be_larger_or_smaller(both: Pair, size: int) -> None:
    await both.tell(both.one, 0, stored(0, 96, size))
    assert await both.found(both.other, ask(), 0.0) == {5: 96}
    await both.tell(both.one, 0, Removed([7096], group=0))
    assert await both.found(both.other, ask(), 9.0) == ({5: 96 - max(size, 16)} if size < 96 else {})
    await both.tell(both.other, 3, stored(0, 96, size), Cleared(), stored(0, 96, size))
    assert (await both.found(both.other, ask(), 20.0))[3] == 96


def test_hashes_stand_for_keys_in_proportion() -> None:
    assert list(pairs([1, 2], [10, 20])) == [(1, 10, 0), (2, 20, 0)]
    assert list(pairs([1, 2, 3, 4], [10, 20])) == [(1, 10, 0), (2, 10, 0), (3, 20, 0), (4, 20, 0)]
    assert list(pairs([1, 2], [10, 11, 20, 21])) == [(1, 10, 0), (1, 11, 1), (2, 20, 0), (2, 21, 1)]
    assert list(pairs([1], [])) == []


async def test_lies_in_the_server_as_llm_d_has_it(both: Pair) -> None:
    await both.tell(both.one, 0, stored(0, 32, 32, medium="cpu"))
    keys = both.one.keys(ask())[16][0]
    assert await both.client.zrange("engine:7032", 0, -1) == [str(k).encode() for k in keys[:2]]
    (field,) = await both.client.hkeys(str(keys[0]))
    assert msgspec.json.decode(field) == {
        "PodIdentifier": A,
        "DeviceTier": "cpu",
        "Speculative": False,
        "HasGroup": True,
        "GroupIdx": 0,
    }
    others = {bytes(key) for key in await both.client.keys("*")} - {str(k).encode() for k in keys}
    assert all(key.startswith(b"engine:") for key in others), "llm-d reads all others as hashes"


async def test_what_llm_d_wrote_is_read(both: Pair) -> None:
    keys = both.one.keys(ask())[16][0]
    for key in keys[:3]:
        await both.client.hset(
            str(key), f'{{"PodIdentifier":"{B}","DeviceTier":"gpu","Speculative":false}}', ""
        )
    await both.client.hset(str(keys[0]), "an older layout@gpu", "")
    await both.client.hset(str(keys[0]), '{"PodIdentifier":"10.9.9.9:1","DeviceTier":"gpu"}', "")
    await both.client.zadd("engine:7048", {str(keys[2]): 0})
    assert await both.found(both.one, ask(), 0.0) == {1: 48}
    await both.tell(both.one, 0, stored(0, 48), stored(48, 64))
    await both.tell(both.other, 3, stored(48, 96))
    assert await both.found(both.one, ask(), 9.0) == {0: 64, 1: 96}


async def test_tiers_weigh_and_known_blocks_can_move(both: Pair) -> None:
    await both.tell(
        both.one, 0, stored(0, 32), Stored([7032], None, b"", 0, medium="cpu"), Removed([7032], group=0)
    )
    assert await both.found(both.other, ask(), 0.0) == {5: 32}
    assert both.other.match(ask(), 0.0).weighted(5) == pytest.approx(16 * 1.8)


async def test_blocks_whose_parent_nobody_knows_are_left_out(both: Pair) -> None:
    await both.tell(both.one, 0, stored(48, 96))
    assert both.one.unknown == 1
    assert await both.found(both.one, ask(), 0.0) == {}
    await both.tell(both.one, 0, Stored([1], None, pack(IDS[:16]), 16, kind="sliding_window"))
    assert await both.found(both.one, ask(), 9.0) == {}


async def test_speaks_for_nobody_without_having_asked(both: Pair) -> None:
    await both.tell(both.one, 0, stored(0, 96))
    assert not both.one.match(ask(), 0.0).slots
    await both.found(both.one, ask(), 0.0)
    match = both.one.match(ask(), FRESH_S / 2)
    assert match.slots == {0}
    assert match.tokens(0) == 96
    assert not both.one.match(ask(), FRESH_S).slots
    await both.found(both.one, ask(), 9.0)
    both.one.remove(0)
    assert not both.one.match(ask(), 9.0).slots


async def test_what_was_just_sent_counts_at_once(both: Pair) -> None:
    await both.tell(both.one, 0, stored(0, 32))
    await both.found(both.one, ask(), 0.0)
    both.one.sent(0, ask(), 0.0)
    assert both.one.match(ask(), 0.5).tokens_by_slot == {0: 96}
    both.one.clear(0)
    assert both.one.match(ask(), 0.5).tokens_by_slot == {}


async def test_a_server_that_is_away_stops_nobody() -> None:
    index = SharedIndex(connect("redis://127.0.0.1:1"), LlmD())
    index.add(0, A, "m")
    for _ in range(MAX_QUEUED + 7):
        index.apply(0, [stored(0, 96)], 0.0)
    assert index.lost == 7
    assert not await index.fetch(index.keys(ask()), 0.0)
    assert not index.match(ask(), 0.0).slots


async def test_what_waited_while_the_server_was_away_is_written(
    both: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pointsman.prefix.shared.RETRY_S", 0.0)
    write: Callable[..., Awaitable[None]] = both.one._write
    tries = 0

    async def fails_twice(batch: Any) -> None:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise Away("gone")
        await write(batch)

    monkeypatch.setattr(both.one, "_write", fails_twice)
    await both.tell(both.one, 0, *[stored(0, 96)] * (BATCH + 5))
    assert tries == 4
    assert await both.found(both.other, ask(), 0.0) == {5: 96}
    assert both.one.lost == 0


async def test_what_the_server_refuses_is_lost_and_the_rest_is_written(both: Pair) -> None:
    await both.client.set("engine:1", "no sorted set")
    await both.tell(both.one, 0, Removed([1], group=0))
    assert both.one.lost == 1
    await both.tell(both.one, 0, stored(0, 96))
    assert await both.found(both.other, ask(), 0.0) == {5: 96}


async def test_what_an_engine_told_before_its_model_is_known_is_written_then(both: Pair) -> None:
    index = SharedIndex(both.client, LlmD("xxh64"))
    index.apply(0, [stored(0, 48)], 0.0)
    assert (index.waiting, index.slots) == (1, frozenset())
    index.add(0, A, "m")
    await both.tell(index, 0, stored(48, 96))
    assert await both.found(both.other, ask(), 0.0) == {5: 96}


async def test_other_names_of_the_base_model_lead_to_the_same_blocks(both: Pair) -> None:
    await both.tell(both.one, 0, stored(0, 96))
    both.other.add(5, A, "m", ["also m"])
    both.other.add(3, B, "n", ["m"])  # here it is another name, and there its own
    assert await both.found(both.other, ask(model="also m"), 0.0) == {5: 96}
    assert await both.found(both.other, ask(), 0.0) == {5: 96}


async def test_who_leaves_is_taken_out_by_those_who_were_told(both: Pair) -> None:
    await both.tell(both.one, 0, stored(0, 96))
    both.other.remove(5)
    assert both.other.waiting == 0
    assert await both.found(both.one, ask(), 0.0) == {0: 96}
    both.one.remove(0)
    await both.tell(both.one, 1, stored(0, 32))
    both.other.add(5, A, "m")
    assert await both.found(both.other, ask(), 9.0) == {3: 32}


async def test_names_from_outside_are_only_names(both: Pair) -> None:
    odd = "a b\n'\" 7"
    await both.tell(both.one, 0, stored(0, 48, medium=odd), stored(48, 96, medium=odd))
    assert await both.found(both.other, ask(), 0.0) == {5: 96}
    await both.tell(both.one, 0, Cleared())
    assert await both.found(both.other, ask(), 9.0) == {}


class Shared:
    """A router's own index and the shared one, and endpoints that it hears or does not."""

    def __init__(self, client: redis.asyncio.Redis) -> None:
        self.pool, self.own = Pool(lambda: 0.0), PreciseIndex()
        self.shared = SharedIndex(client, LlmD("xxh64"))
        self.blocks = SharedBlocks(self.own, self.shared, self.pool, lambda: 0.0)
        for address in (A, B):
            (target,) = targets_of(Endpoint(url=f"http://{address}"))
            self.pool.add(target, "test")
            self.pool.learn_models(address, [{"id": "m"}])

    async def match(self, asked: InferenceRequest) -> BlockMatch:
        reading = self.blocks.read(asked, self.pool.candidates("m"), 9.0)
        assert (reading if isinstance(reading, str) else await reading) == ""
        return self.blocks.match(asked, 0.0)


async def test_what_was_heard_here_goes_before_what_others_wrote(both: Pair) -> None:
    await both.tell(both.one, 0, stored(0, 96))
    await both.tell(both.one, 1, stored(0, 96))
    router = Shared(both.client)
    assert (await router.match(ask())).tokens_by_slot == {0: 96, 1: 96}
    router.blocks.add(0)
    router.blocks.apply(0, [stored(0, 32)], 0.0)
    found = await router.match(ask())
    assert found.tokens_by_slot == found.tokens_in("gpu") == {0: 32, 1: 96}
    assert [found.block_tokens(slot) for slot in (0, 1, 2)] == [16, 16, 0]
    router.own.suspend(1)
    asked = ask()
    found = await router.match(asked)
    assert (found.slots, found.tokens_by_slot) == ({0}, {0: 32})
    router.blocks.sent(0, asked, 0.0, found)
    assert router.blocks.match(asked, 0.0).tokens_by_slot == {0: 96}


async def test_who_begins_late_to_listen_leaves_what_others_wrote(both: Pair) -> None:
    await both.tell(both.one, 0, stored(0, 96))
    router = Shared(both.client)
    router.blocks.add(0)
    router.blocks.missed(0)
    router.blocks.apply(0, [stored(0, 32)], 0.0)
    found = await router.match(ask())
    assert (found.tokens_by_slot, found.partial) == ({0: 96}, {0})
    waiting = router.shared.waiting
    router.blocks.missed(0)  # now what we wrote may be wrong
    assert router.shared.waiting == waiting + 1


def test_an_address_that_is_none_is_said_so() -> None:
    with pytest.raises(SettingsError, match="no address of a Redis server"):
        connect("http://127.0.0.1")


def test_llm_ds_schemes_are_schemes() -> None:
    scheme: Scheme = LlmD()
    assert scheme.chained
