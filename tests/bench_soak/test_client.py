"""The mix of requests, sent straight to simulated engines."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import AsyncIterator

import pytest
from bench.soak.asks import BLOCK_TOKENS, MODEL, Ask, asks
from bench.soak.chaos import Event, Record
from bench.soak.client import Client, Reply
from bench.soak.gateway import Trace
from bench.soak.verdict import Verdict, judge

from pointsman.sim.fleet import running_fleet
from pointsman.sim.server import SimulatedEngine
from pointsman.sim.spec import EngineSpec

MIX = list(itertools.islice(asks(random.Random(1)), 3000))


def first(kind: str, *, stream: bool | None = None) -> Ask:
    return next(a for a in MIX if a.kind == kind and stream in (None, a.stream) and a.max_tokens != 1)


@pytest.fixture
async def engine() -> AsyncIterator[SimulatedEngine]:
    spec = EngineSpec(model=MODEL, block_tokens=BLOCK_TOKENS, accelerator="gaudi3")
    async with running_fleet([spec], speed=50) as (engine,):
        yield engine


async def send(engine: SimulatedEngine, ask: Ask) -> Reply:
    client = Client(engine.port)
    client.hurry.set()
    try:
        return await client.send(ask, "id")
    finally:
        client.close()


def verdict(ask: Ask, reply: Reply, *, crashed: bool = False) -> Verdict:
    record = Record()
    if crashed:
        record.add("e", Event(0.0, 0, "crash", {"for_s": 9.0}), reply.sent_s, reply.sent_s)
    return judge(ask, reply, Trace(["e"]), record).verdict


def test_the_mix_has_everything_and_mostly_wants_answers() -> None:
    kinds = Counter(a.kind for a in MIX)
    assert kinds.keys() == {
        "stream", "plain", "leave", "slow", "json", "model", "path", "http", "value", "half"
    }  # fmt: skip
    assert kinds["stream"] + kinds["plain"] > 0.75 * len(MIX)
    assert {a.path for a in MIX if a.kind == "stream"} == {"/v1/chat/completions", "/v1/completions"}


def test_most_prompts_share_their_beginning_with_others() -> None:
    starts = Counter(a.body[:2000] for a in MIX if a.kind == "plain")
    assert sum(n for n in starts.values() if n > 3) > 0.5 * sum(starts.values())


@pytest.mark.parametrize("kind", ["stream", "plain", "slow", "value"])
async def test_an_engine_answers_as_the_harness_expects(engine: SimulatedEngine, kind: str) -> None:
    for ask in [a for a in MIX if a.kind == kind][:12]:
        assert verdict(ask, await send(engine, ask)) is Verdict.OK


async def test_a_client_that_leaves_makes_the_engine_stop(engine: SimulatedEngine) -> None:
    ask = next(a for a in MIX if a.leave_after_chunks)
    assert verdict(ask, await send(engine, ask)) is Verdict.LEFT


@pytest.mark.parametrize("kind", ["close", "reset", "garbage"])
@pytest.mark.parametrize("stream", [True, False])
async def test_an_answer_that_is_broken_off_is_seen_as_cut(
    engine: SimulatedEngine, kind: str, stream: bool
) -> None:
    engine.fault(kind, after_chunks=1)
    ask = first("stream" if stream else "plain", stream=stream)
    reply = await send(engine, ask)
    assert reply.end == "cut"
    assert verdict(ask, reply, crashed=True) in (Verdict.CUT, Verdict.LOST)
    assert verdict(ask, reply) in (Verdict.CUT_NO_CAUSE, Verdict.LOST)


async def test_a_port_where_nobody_listens_is_a_loss_not_a_crash_of_the_harness(
    engine: SimulatedEngine,
) -> None:
    engine.fault("refuse")
    ask = first("plain")
    reply = await send(engine, ask)
    assert (reply.status, reply.end) == (0, "cut")
    assert verdict(ask, reply, crashed=True) is Verdict.LOST
