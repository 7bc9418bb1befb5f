"""A simulated engine's KV events over ZMQ, heard as a router hears them."""

from __future__ import annotations

import asyncio
import builtins
import random
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio

from pointsman.errors import SettingsError
from pointsman.prefix.kv_wire import Batch, Cleared, Removed, Stored, decode
from pointsman.sim import tokens
from pointsman.sim.fleet import running_fleet
from pointsman.sim.kv_layouts import Layout
from pointsman.sim.server import SimulatedEngine
from pointsman.sim.spec import EngineSpec, FleetItem, KvEvents, expand

Ask = Callable[..., Awaitable[Any]]
SPEED = 50
PATH = "/v1/completions"
TIMEOUT_S = 10
AT_ONCE = KvEvents(endpoint="tcp://*:0", replay_endpoint="tcp://*:0", delay_s=0)
Message = tuple[str, int, Batch]


def read(parts: list[bytes]) -> Message:
    topic, number, payload = parts
    assert len(number) == 8
    batch = decode(payload)
    assert not batch.skipped
    return topic.decode(), int.from_bytes(number, "big"), batch


class Listener:
    """One subscriber."""

    def __init__(self, socket: zmq.asyncio.Socket) -> None:
        self.socket = socket

    async def parts(self) -> list[bytes]:
        return await asyncio.wait_for(self.socket.recv_multipart(), TIMEOUT_S)

    async def next(self) -> Message:
        return read(await self.parts())

    async def nothing_within(self, seconds: float) -> bool:
        return not await self.socket.poll(int(seconds * 1000))


@asynccontextmanager
async def listening(ask: Ask, engine: SimulatedEngine) -> AsyncIterator[Listener]:
    """A subscriber by what ``/kv_event_sources`` says, from the first message on that it gets."""
    ((_, source),) = (await ask(engine.url, "/kv_event_sources")).json().items()
    context = zmq.asyncio.Context()
    try:
        socket = context.socket(zmq.SUB)
        socket.subscribe(b"kv@")
        socket.connect(source["endpoint"].replace("*", "127.0.0.1"))
        for i in range(100):  # whoever subscribes is not told when it is heard
            await ask(engine.url, PATH, {"prompt": f"warm up {i} " * 10, "max_tokens": 1})
            if await socket.poll(50):
                break
        while await socket.poll(20):
            await socket.recv_multipart()
        yield Listener(socket)
    finally:
        context.destroy(linger=0)


async def replayed(engine: SimulatedEngine, ask: Ask, start: int) -> list[list[bytes]]:
    """All answers of the replay socket, the end marker's included."""
    ((_, source),) = (await ask(engine.url, "/kv_event_sources")).json().items()
    context = zmq.asyncio.Context()
    try:
        socket = context.socket(zmq.DEALER)
        socket.connect(source["replay_endpoint"])
        await socket.send_multipart([b"", start.to_bytes(8, "big")])
        found: list[list[bytes]] = []
        while not found or b"\xff" * 8 not in found[-1]:
            found.append(await asyncio.wait_for(socket.recv_multipart(), TIMEOUT_S))
        return found
    finally:
        context.destroy(linger=0)


def spec(events: KvEvents = AT_ONCE, **fields: Any) -> EngineSpec:
    return EngineSpec(name="engine", kv_events=events, **fields)


def completion(prompt: object, **fields: object) -> dict[str, object]:
    return {"prompt": prompt, "max_tokens": 1, **fields}


async def test_a_prompts_blocks_are_told_with_the_tokens_that_tokenize_gives(ask: Ask) -> None:
    prompt = "four" * 40 + "and a rest"
    async with running_fleet([spec()], speed=SPEED) as (engine,), listening(ask, engine) as listener:
        answer = (
            await ask(engine.url, PATH, completion(prompt, max_tokens=30, return_token_ids=True))
        ).json()
        told = (await ask(engine.url, "/tokenize", {"prompt": prompt, "return_token_strs": True})).json()
        topic, number, batch = await listener.next()
        _, following, rest = await listener.next()
        again = (await ask(engine.url, PATH, completion(told["tokens"]))).json()
        port, max_model_len = engine.port, engine.max_model_len
    assert topic == f"kv@127.0.0.1:{port}@granite-4.1-8b"
    assert following == number + 1
    assert batch.rank == 0
    (prefill,), (output,) = batch.events, rest.events
    assert isinstance(prefill, Stored)
    assert isinstance(output, Stored)
    assert (prefill.parent, prefill.block_size, prefill.medium) == (None, 16, "gpu")
    assert (prefill.kind, prefill.group) == ("full_attention", 0)
    assert output.parent == prefill.hashes[-1]
    choice = answer["choices"][0]
    assert told["count"] == len(told["tokens"]) == 43
    assert told["max_model_len"] == max_model_len
    assert "".join(told["token_strs"]) == prompt
    assert choice["prompt_token_ids"] == told["tokens"]
    assert tokens.to_ids(prefill.token_ids) == told["tokens"][:32]
    assert tokens.to_ids(output.token_ids) == [*told["tokens"][32:], *choice["token_ids"]][:32]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 32


async def test_a_chat_with_tools_is_told_as_tokenize_renders_it(ask: Ask) -> None:
    chat = {"messages": [{"role": "user", "content": "x" * 300}], "tools": [{"type": "function"}]}
    async with running_fleet([spec()], speed=SPEED) as (engine,), listening(ask, engine) as listener:
        await ask(engine.url, "/v1/chat/completions", {**chat, "max_tokens": 1})
        told = (await ask(engine.url, "/tokenize", chat)).json()["tokens"]
        _, _, batch = await listener.next()
    (event,) = batch.events
    assert isinstance(event, Stored)
    assert tokens.to_ids(event.token_ids) == told[: len(told) // 16 * 16]


@pytest.mark.parametrize("layout", Layout.__args__)
@pytest.mark.parametrize("int_hashes", [True, False])
async def test_every_layout_says_the_same(ask: Ask, layout: Layout, int_hashes: bool) -> None:
    events = msgspec.structs.replace(AT_ONCE, layout=layout, int_block_hashes=int_hashes)
    heard = []
    for settings in (AT_ONCE, events):
        async with (
            running_fleet([spec(settings, kv_tokens=160)], speed=SPEED) as (engine,),
            listening(ask, engine) as listener,
        ):
            await ask(engine.url, "/reset_prefix_cache", b"")
            for text in ("abcd", "efgh"):
                await ask(engine.url, PATH, completion(text * 120))
            heard.append([(await listener.next())[2].events for _ in range(2)])
            raw = [parts[-1] for parts in await replayed(engine, ask, 0)][-2]
    assert [[type(e) for e in events] for events in heard[0]] == [
        [Cleared, Stored],
        [*[Removed] * 5, Stored],
    ]
    if layout == "short-array":
        heard = [msgspec.convert([[_without_kind(e) for e in b] for b in part], Any) for part in heard]
    assert heard[0] == heard[1]
    batch = msgspec.msgpack.decode(raw)
    assert isinstance(batch, dict) == (layout == "batch-map")
    stored = (batch["events"] if isinstance(batch, dict) else batch[1])[-1]
    assert isinstance(stored, dict) == (layout in ("map", "batch-map"))
    if isinstance(stored, dict):
        assert list(stored) == [
            *("type", "block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium"),
            *("lora_name", "extra_keys", "group_idx", "kv_cache_spec_kind"),
        ]
        hashes = stored["block_hashes"]
    else:
        hashes = stored[1]
        assert len(stored) == (7 if layout == "short-array" else 11)
    assert {type(h) for h in hashes} == {int if int_hashes else bytes}
    assert int_hashes or {len(h) for h in hashes} == {32}


def _without_kind(event: object) -> object:
    if isinstance(event, Stored):
        return msgspec.structs.replace(event, kind="")
    return msgspec.structs.replace(event, group=None) if isinstance(event, Removed) else event


async def test_salt_and_adapter_are_extra_keys(ask: Ask) -> None:
    prompt = "four" * 40
    engine_spec = spec(loras=("other", "adapter"))
    async with running_fleet([engine_spec], speed=SPEED) as (engine,), listening(ask, engine) as listener:
        for fields in (
            {"cache_salt": "one"},
            {"model": "adapter"},
            {"model": "adapter", "cache_salt": "one"},
        ):
            await ask(engine.url, PATH, completion(prompt, **fields))
        batches = [await listener.next() for _ in range(3)]
        raw = [msgspec.msgpack.decode(p[-1]) for p in (await replayed(engine, ask, batches[0][1]))[:-1]]
    stored = [batch.events[0] for _, _, batch in batches]
    assert all(isinstance(event, Stored) for event in stored)
    assert [event.extra_keys for event in stored] == [
        (("one",), None),
        (("adapter",), ("adapter",)),
        (("adapter", "one"), ("adapter",)),
    ]
    assert [event.lora for event in stored] == ["", "adapter", "adapter"]
    assert [batch[1][0]["lora_id"] for batch in raw] == [None, 2, 2]
    assert len({h for event in stored for h in event.hashes}) == 6


async def test_blocks_move_to_the_cpu_by_hash_alone_and_are_found_there(ask: Ask) -> None:
    engine_spec = spec(kv_tokens=160, cpu_kv_tokens=1600)
    async with running_fleet([engine_spec], speed=SPEED) as (engine,), listening(ask, engine) as listener:
        await ask(engine.url, "/reset_prefix_cache", b"")
        for text in ("abcd", "efgh", "abcd"):
            answer = (await ask(engine.url, PATH, completion(text * 120))).json()
        told = [event for _ in range(3) for event in (await listener.next())[2].events]
        page = (await ask(engine.url, "/metrics")).body.decode()
    moved = [event for event in told if isinstance(event, Stored) and not event.token_ids]
    assert moved
    assert {(event.medium, event.block_size) for event in moved} == {("cpu", 0)}
    for event in moved:
        assert told.index(event) < told.index(Removed(event.hashes, "gpu", 0))
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 112
    assert 'vllm:external_prefix_cache_hits_total{engine="0",model_name="granite-4.1-8b"} 80.0' in page
    assert '_by_source_total{engine="0",model_name="granite-4.1-8b",source="host"} 80.0' in page


async def test_who_missed_messages_can_have_them_again_from_any_number_on(ask: Ask) -> None:
    async with running_fleet([spec()], speed=SPEED) as (engine,), listening(ask, engine) as listener:
        await ask(engine.url, PATH, completion("four" * 40))
        topic, number, batch = await listener.next()
        whole = await replayed(engine, ask, 0)
        last = await replayed(engine, ask, number)
        none = await replayed(engine, ask, number + 1)
    assert [int.from_bytes(parts[2], "big") for parts in whole[:-1]] == list(range(number + 1))
    assert whole[-1] == [b"", b"", b"\xff" * 8, b""]
    assert none == [whole[-1]]
    assert read(last[0][1:]) == (topic, number, batch)
    assert last[1:] == none


async def test_the_newer_replay_has_no_topic(ask: Ask) -> None:
    events = msgspec.structs.replace(AT_ONCE, layout="batch-map")
    async with running_fleet([spec(events)], speed=SPEED) as (engine,), listening(ask, engine):
        answers = await replayed(engine, ask, 0)
    assert {len(parts) for parts in answers} == {3}
    assert answers[-1][1:] == [b"\xff" * 8, b""]


async def test_messages_beyond_the_buffer_are_gone(ask: Ask) -> None:
    events = msgspec.structs.replace(AT_ONCE, buffer_steps=2)
    async with running_fleet([spec(events)], speed=SPEED) as (engine,):
        for i in range(4):
            await ask(engine.url, PATH, completion(f"{i:4d}" * 40))
        answers = await replayed(engine, ask, 0)
    assert [int.from_bytes(parts[2], "big") for parts in answers[:-1]] == [2, 3]


async def test_an_endpoint_of_one_address_is_connected_to(ask: Ask) -> None:
    context = zmq.asyncio.Context()
    try:
        socket = context.socket(zmq.SUB)
        socket.subscribe(b"")
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        events = KvEvents(endpoint=f"tcp://127.0.0.1:{port}", topic="kv@pod-7@m", delay_s=0)
        async with running_fleet([spec(events)], speed=SPEED) as (engine,):
            sources = (await ask(engine.url, "/kv_event_sources")).json()
            for i in range(100):
                await ask(engine.url, PATH, completion(f"{i:4d}" * 40))
                if await socket.poll(50):
                    break
            topic, _, _ = read(await Listener(socket).parts())
    finally:
        context.destroy(linger=0)
    assert topic == "kv@pod-7@m"
    assert sources["0"] == {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": f"tcp://127.0.0.1:{port}",
        "replay_endpoint": None,
        "buffer_steps": 10000,
        "hwm": 100000,
        "max_queue_size": 100000,
        "topic": "kv@pod-7@m",
    }


async def test_a_bound_port_is_told_for_all_addresses_and_is_empty_without_events(ask: Ask) -> None:
    plain = EngineSpec(name="plain")
    async with running_fleet([spec(), plain], speed=SPEED) as (engine, silent):
        source = (await ask(engine.url, "/kv_event_sources")).json()["0"]
        assert (await ask(silent.url, "/kv_event_sources")).json() == {}
    assert source["endpoint"].startswith("tcp://*:")
    assert source["replay_endpoint"].startswith("tcp://127.0.0.1:")
    assert source["topic"] == f"kv@127.0.0.1:{engine.port}@granite-4.1-8b"


async def test_messages_come_after_their_delay(ask: Ask) -> None:
    events = msgspec.structs.replace(AT_ONCE, delay_s=0.3)
    async with running_fleet([spec(events)], speed=SPEED) as (engine,):
        await ask(engine.url, PATH, completion("four" * 40))
        assert len(await replayed(engine, ask, 0)) == 1
        async with asyncio.timeout(TIMEOUT_S):
            while len(await replayed(engine, ask, 0)) == 1:
                pass


async def test_after_a_restart_numbers_begin_at_zero_on_the_same_port(ask: Ask) -> None:
    async with running_fleet([spec()], speed=SPEED) as (engine,), listening(ask, engine) as listener:
        before = (await ask(engine.url, "/kv_event_sources")).json()
        engine.fault("restart")
        await engine.until(lambda state: state.up and state.restarts == 1)
        heard = None
        for i in range(100):  # the subscriber connects again by itself
            await ask(engine.url, PATH, completion(f"{i:4d}" * 40))
            if await listener.socket.poll(50):
                heard = await listener.next()
                break
        assert heard is not None
        assert heard[1] <= i
        assert (await ask(engine.url, "/kv_event_sources")).json() == before
        first = read((await replayed(engine, ask, 0))[0][1:])
    assert first[1] == 0
    assert isinstance(first[2].events[0], Stored)


async def test_lost_messages_leave_gaps_and_can_be_had_again(ask: Ask) -> None:
    async with running_fleet([spec()], speed=SPEED) as (engine,), listening(ask, engine) as listener:
        engine.fault("lose-events", every=3, count=2)
        for i in range(9):
            await ask(engine.url, PATH, completion(f"{i:4d}" * 40))
        numbers = [(await listener.next())[1] for _ in range(7)]
        again = await replayed(engine, ask, numbers[0])
    start = numbers[0]
    assert [n - start for n in numbers] == [0, 1, 3, 4, 6, 7, 8]
    assert [int.from_bytes(parts[2], "big") - start for parts in again[:-1]] == list(range(9))


async def test_late_messages_stay_in_order(ask: Ask) -> None:
    async with running_fleet([spec()], speed=SPEED) as (engine,), listening(ask, engine) as listener:
        engine.fault("late-events", delay_s=0.2)
        await ask(engine.url, PATH, completion("late" * 40))
        engine.clear_faults()
        await ask(engine.url, PATH, completion("next" * 40))
        assert await listener.nothing_within(0.05)
        late, following = await listener.next(), await listener.next()
    assert late[1] + 1 == following[1]
    assert [text[:4] for _, _, batch in (late, following) for text in (batch.events[0].token_ids,)] == [
        b"late",
        b"next",
    ]


async def test_what_is_not_published_takes_no_number(ask: Ask) -> None:
    async with running_fleet([spec()], speed=SPEED) as (engine,), listening(ask, engine) as listener:
        await ask(engine.url, PATH, completion("heard" * 40))
        _, before, _ = await listener.next()
        engine.fault("stop-events")
        await ask(engine.url, PATH, completion("silence" * 40))
        engine.clear_faults()
        await ask(engine.url, PATH, completion("again" * 40))
        _, after, batch = await listener.next()
    assert after == before + 1
    assert batch.events[0].token_ids.startswith(b"again")


async def test_numbers_can_begin_anew_with_the_cache_as_it_is(ask: Ask) -> None:
    async with running_fleet([spec()], speed=SPEED) as (engine,), listening(ask, engine) as listener:
        await ask(engine.url, PATH, completion("kept" * 40))
        assert (await listener.next())[1] > 0
        engine.fault("renumber-events")
        assert len(await replayed(engine, ask, 0)) == 1
        answer = (await ask(engine.url, PATH, completion("kept" * 40 + "more" * 40))).json()
        _, number, _ = await listener.next()
    assert number == 0
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 32


async def test_a_taken_port_is_named(ask: Ask) -> None:
    async with running_fleet([spec()], speed=SPEED) as (engine,):
        port = (await ask(engine.url, "/kv_event_sources")).json()["0"]["endpoint"].rpartition(":")[2]
        with pytest.raises(SettingsError, match=f"kv_events: cannot use tcp://127.0.0.1:{port} "):
            async with running_fleet([spec(KvEvents(endpoint=f"tcp://*:{port}"))]):
                pass


async def test_without_pyzmq_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "zmq":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    monkeypatch.delitem(sys.modules, "zmq", raising=False)
    with pytest.raises(SettingsError, match=r"pip install 'pointsman\[kv-events\]'"):
        async with running_fleet([spec()]):
            pass


def test_engines_alike_publish_on_ports_of_their_own() -> None:
    item = FleetItem(count=3, kv_events=KvEvents(endpoint="tcp://*:5557", replay_endpoint="tcp://*:5657"))
    free, outward = (
        FleetItem(count=2, name=endpoint, kv_events=KvEvents(endpoint=endpoint))
        for endpoint in ("tcp://*:0", "tcp://h:5557")
    )
    events = [each.kv_events for each in expand([item, free, outward])]
    assert [e and e.endpoint for e in events] == [
        *("tcp://*:5557", "tcp://*:5558", "tcp://*:5559"),
        *["tcp://*:0"] * 2,
        *["tcp://h:5557"] * 2,
    ]
    assert [e and e.replay_endpoint for e in events[:3]] == ["tcp://*:5657", "tcp://*:5658", "tcp://*:5659"]


async def test_a_data_parallel_rank_has_its_own_port_and_says_which_it_is(ask: Ask) -> None:
    for _ in range(20):  # a port that is free with the one after it
        port = random.randrange(20_000, 30_000)
        events = KvEvents(endpoint=f"tcp://*:{port}", delay_s=0)
        ranks = [EngineSpec(name=f"rank-{r}", kv_events=events, data_parallel_rank=r) for r in range(2)]
        try:
            async with running_fleet(ranks, speed=SPEED) as (_, second):
                sources = (await ask(second.url, "/kv_event_sources")).json()
                async with listening(ask, second) as listener:
                    await ask(second.url, PATH, completion("rank" * 40))
                    _, _, batch = await listener.next()
        except SettingsError:
            continue
        break
    assert list(sources) == ["1"]
    assert sources["1"]["endpoint"] == f"tcp://*:{port + 1}"
    assert batch.rank == 1
