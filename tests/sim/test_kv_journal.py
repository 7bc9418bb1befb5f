"""The journal of an engine against its cache: whoever follows the events knows what is cached, to the
block.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pointsman.sim import tokens
from pointsman.sim.engine import Engine, EngineRequest
from pointsman.sim.kv_journal import CPU, GPU, Cleared, Event, Journal, Removed, Stored
from pointsman.sim.kv_names import NAMERS
from pointsman.sim.profiles import EngineParameters
from pointsman.sim.text import Text

BLOCK = 4


def parameters(kv_blocks: int, cpu_blocks: int) -> EngineParameters:
    return EngineParameters(
        base_s=8e-3,
        sequence_s=20e-6,
        context_token_s=75e-9,
        prefill_tokens_per_s=10_000.0,
        prefill_step_s=5e-3,
        kv_tokens=kv_blocks * BLOCK,
        cpu_kv_tokens=cpu_blocks * BLOCK,
        max_sequences=8,
        block_tokens=BLOCK,
        step_tokens=32,
    )


class Follower:
    """What somebody who only hears the events believes."""

    def __init__(self) -> None:
        self.held: dict[str, set[bytes]] = {GPU: set(), CPU: set()}
        self.children: dict[tuple[bytes | None, object, bytes], bytes] = {}

    def hear(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Cleared):
                self.held = {GPU: set(), CPU: set()}
            elif isinstance(event, Removed):
                assert len(event.names) == 1
                self.held[event.medium].remove(event.names[0])
            elif not event.token_ids:
                assert self.held[GPU].issuperset(event.names), "tier of an unknown block"
                self.held[event.medium].update(event.names)
            else:
                self._stored(event)

    def _stored(self, event: Stored) -> None:
        assert self.held[GPU].isdisjoint(event.names), "stored twice"
        assert event.parent is None or event.parent in self.held[GPU]
        size = BLOCK * tokens.TOKEN_BYTES
        assert len(event.token_ids) == size * len(event.names)
        parent = event.parent
        for i, (name, extra) in enumerate(zip(event.names, event.extra_keys, strict=True)):
            self.children[parent, extra, event.token_ids[i * size : (i + 1) * size]] = name
            parent = name
        self.held[GPU].update(event.names)

    def cached_tokens(self, ids: bytes, lora: str, salt: str) -> int:
        size = BLOCK * tokens.TOKEN_BYTES
        known = self.held[GPU] | self.held[CPU]
        parent: bytes | None = None
        most = (len(ids) // tokens.TOKEN_BYTES - 1) // BLOCK
        for block in range(most):
            extra = tuple(filter(None, (lora, "" if block else salt))) or None
            name = self.children.get((parent, extra, ids[block * size : (block + 1) * size]))
            if name not in known:
                return block * BLOCK
            parent = name
        return most * BLOCK


class Client:
    """Sends prompts to an engine and follows its events."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.follower = Follower()
        self.now_s = 0.0
        self.hasher = tokens.BlockHasher()

    def request(self, ids: bytes, output_tokens: int, lora: str = "", salt: str = "") -> EngineRequest:
        seed = hash((lora, salt)) & (1 << 63) - 1
        chain = self.hasher.hash(ids, BLOCK, seed)
        count = tokens.count(ids)

        def answer(n: int) -> bytes:
            return tokens.output(len(ids), 0, n)

        def continuation(kv_tokens: int) -> list[int]:
            return tokens.continued_hashes(ids, chain, answer(kv_tokens - count), BLOCK, seed)

        text = Text(ids, answer, BLOCK, lora, salt)
        return EngineRequest(chain, count, output_tokens, continuation=continuation, content=text)

    def submit(self, request: EngineRequest) -> None:
        self.engine.submit(request, self.now_s)
        if self.engine.idle:
            self.engine.start(self.now_s)

    def step(self) -> bool:
        """One run of steps; False when there was none."""
        engine = self.engine
        if engine.idle:
            return False
        self.now_s = engine.due_s
        engine.finish()
        assert engine.journal is not None
        self.follower.hear(engine.journal.take())
        engine.start(self.now_s)
        return True

    def run(self) -> None:
        while self.step():
            pass


def prompt(rng: random.Random, family: int, shared_tokens: int, own_tokens: int) -> bytes:
    head = random.Random(family).randbytes(shared_tokens * tokens.TOKEN_BYTES)
    return head + rng.randbytes(own_tokens * tokens.TOKEN_BYTES)


calls = st.lists(
    st.tuples(
        st.integers(0, 3),  # family
        st.integers(0, 40),  # tokens it shares
        st.integers(1, 12),  # of its own
        st.integers(1, 20),  # of the answer
        st.sampled_from([("", ""), ("", ""), ("adapter", ""), ("", "salt"), ("adapter", "salt")]),
        st.booleans(),  # the next turn follows: prompt, answer, and more
    ),
    max_size=25,
)


@pytest.mark.parametrize("namer", NAMERS)
@pytest.mark.parametrize("cpu_blocks", [0, 7, 60])
@settings(max_examples=60, deadline=None)
@given(calls, st.sampled_from([24, 40, 1000]), st.randoms(use_true_random=False))
def test_events_predict_cached_tokens_of_sequential_requests_exactly(
    namer: str, cpu_blocks: int, asked: list[tuple[int, ...]], kv_blocks: int, rng: random.Random
) -> None:
    client = Client(Engine(parameters(kv_blocks, cpu_blocks), Journal(NAMERS[namer])))
    for family, shared, own, output, (lora, salt), follows in asked:
        ids = prompt(rng, family, shared, own)
        for _ in range(2 if follows else 1):
            predicted = client.follower.cached_tokens(ids, lora, salt)
            request = client.request(ids, output, lora, salt)
            client.submit(request)
            client.run()
            assert request.cached_tokens == predicted
            ids += tokens.output(len(ids), 0, output) + b"more"


@pytest.mark.parametrize("cpu_blocks", [0, 7])
@settings(max_examples=100, deadline=None)
@given(calls, st.sampled_from([24, 40, 1000]), st.randoms(use_true_random=False))
def test_after_any_crowd_the_follower_holds_what_the_engine_holds(
    cpu_blocks: int, asked: list[tuple[int, ...]], kv_blocks: int, rng: random.Random
) -> None:
    engine = Engine(parameters(kv_blocks, cpu_blocks), Journal(NAMERS["opaque"]))
    client = Client(engine)
    running: list[EngineRequest] = []
    for family, shared, own, output, (lora, salt), pause in asked:
        running.append(client.request(prompt(rng, family, shared, own), output, lora, salt))
        client.submit(running[-1])
        if pause:
            client.step()
            engine.cancel(rng.choice(running), client.now_s)
    client.run()
    assert len(client.follower.held[GPU]) == engine.kv.cached_blocks
    assert len(client.follower.held[CPU]) <= cpu_blocks
    for family in range(4):
        ids = prompt(rng, family, 40, 4)
        predicted = client.follower.cached_tokens(ids, "", "")
        request = client.request(ids, 1)
        client.submit(request)
        client.run()
        assert request.cached_tokens == predicted


def test_evicted_blocks_leave_before_those_that_needed_the_room_and_the_chains_end_goes_first() -> None:
    engine = Engine(parameters(10, 0), Journal(NAMERS["opaque"]))
    assert engine.journal is not None
    old = b"".join(b"%4d" % i for i in range(24))
    new = b"".join(b"new%d" % (i % 10) for i in range(32))
    client = Client(engine)
    client.submit(client.request(old, 1))
    client.run()
    names = list(client.follower.children.values())
    client.submit(client.request(new, 1))
    engine.finish()
    events = engine.journal.take()
    kinds = [type(event) for event in events]
    assert kinds == [Removed] * 4 + [Stored]
    assert [event.names[0] for event in events if isinstance(event, Removed)] == names[:1:-1]


def test_an_evicted_block_is_on_the_cpu_before_it_leaves_the_gpu_and_comes_back_quicker() -> None:
    durations: Mapping[int, list[float]] = {0: [], 100: []}
    for cpu_blocks, seen in durations.items():
        client = Client(Engine(parameters(10, cpu_blocks), Journal(NAMERS["opaque"])))
        rng = random.Random(1)
        first, second = prompt(rng, 0, 36, 1), prompt(rng, 1, 36, 1)
        for ids in (first, second, first):
            request = client.request(ids, 1)
            client.submit(request)
            client.run()
            seen.append(request.ended_s - request.arrived_s)
        assert request.cached_tokens == (36 if cpu_blocks else 0)
        assert client.engine.fetched_tokens == request.cached_tokens
    assert durations[0][2] == pytest.approx(durations[0][0])
    computed_s, fetched_s = durations[0][2], durations[100][2]
    assert fetched_s < computed_s / 1.5


def test_a_reset_is_told_with_the_next_step_and_refused_while_blocks_are_held() -> None:
    engine = Engine(parameters(100, 0), Journal(NAMERS["opaque"]))
    assert engine.journal is not None
    client = Client(engine)
    rng = random.Random(1)
    client.submit(client.request(prompt(rng, 0, 20, 1), 5))
    assert not engine.reset_cache()
    client.run()
    assert engine.kv.cached_blocks == 6
    assert engine.reset_cache()
    client.submit(client.request(prompt(rng, 0, 20, 1), 1))
    engine.finish()
    first, *rest = engine.journal.take()
    assert isinstance(first, Cleared)
    assert [type(event) for event in rest] == [Stored]


def test_a_full_cache_has_no_long_runs_that_would_tell_late_of_what_they_evict() -> None:
    runs = {}
    for kept in (None, Journal(NAMERS["opaque"])):
        engine = Engine(parameters(100, 0), kept)
        client = Client(engine)
        for family in range(5):
            engine.submit(client.request(prompt(random.Random(1), family, 100, 1), 1), client.now_s)
            _longest_run(client)
        engine.submit(client.request(b"last" * 10, 200), client.now_s)
        runs[kept is None] = _longest_run(client)
    assert runs[True] > 100
    assert runs[False] <= 8


def _longest_run(client: Client) -> int:
    """Steps of the longest run until nothing is left to do."""
    engine, longest = client.engine, 0
    engine.start(client.now_s)
    while not engine.idle:
        client.now_s = engine.due_s
        longest = max(longest, engine.finish().steps)
        engine.start(client.now_s)
    return longest
