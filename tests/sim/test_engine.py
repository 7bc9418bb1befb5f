"""The engine model against a slow one that does every step and every block by itself, as vLLM does."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from pointsman.sim.drafts import Drafts
from pointsman.sim.engine import Engine, EngineRequest, Phase, Ran
from pointsman.sim.jitter import Jitter
from pointsman.sim.profiles import ACCELERATORS, GRANITE, PARAMETERS, EngineParameters
from pointsman.sim.variants import Variants


def parameters(**changes: object) -> EngineParameters:
    fields = {
        "base_s": 8e-3,
        "sequence_s": 20e-6,
        "context_token_s": 75e-9,
        "prefill_tokens_per_s": 10_000.0,
        "prefill_step_s": 5e-3,
        "kv_tokens": 4096,
        "max_sequences": 8,
        "block_tokens": 4,
        "step_tokens": 64,
    }
    return EngineParameters(**(fields | changes))


def blocks_of(family: int, tokens: int, own: int, block: int = 4) -> list[int]:
    """Chained hashes of a prompt: shared by ``family`` up to three quarters, then its ``own``."""
    shared = tokens * 3 // 4 // block
    return [hash((family, i, 0 if i < shared else own, i >= shared)) for i in range(tokens // block)]


def run_until_idle(engine: Engine, now_s: float = 0.0, max_steps: int = 1 << 40) -> tuple[float, list[Ran]]:
    runs = []
    while True:
        if engine.idle:
            engine.start(now_s, max_steps)
        if math.isinf(engine.due_s):
            return now_s, runs
        now_s = engine.due_s
        runs.append(engine.finish())


class Slow:
    """One step at a time, one block at a time. Every block has a row: [hash or None, holders]."""

    def __init__(self, p: EngineParameters) -> None:
        self.p = p
        self.free: list[list] = [[None, 0] for _ in range(p.kv_blocks)]
        self.known: dict[int, list] = {}
        self.waiting: list[dict] = []
        self.running: list[dict] = []
        self.preemptions = 0
        self.drafted = p.variants.num_speculative_tokens
        self.drafts = Drafts(p.variants)
        self.jitter = Jitter(p.variants.step_jitter, p.variants.seed)
        self.compiled: set[tuple[int, int]] = set()
        self.done = 0
        self.steps: list[tuple[float, int, list[int]]] = []
        """When each began, blocks held during it, tokens that were out before it, by request."""

    def take(self) -> list:
        block = self.free.pop(0)
        if block[0] is not None:
            del self.known[block[0]]
            block[0] = None
        block[1] = 1
        return block

    def free_all(self, r: dict) -> None:
        for block in reversed(r["held"]):
            block[1] -= 1
            if not block[1]:
                self.free.append(block)
        r["held"] = []

    def remember(self, r: dict, computed: int) -> None:
        for i in range(min(computed // self.p.block_tokens, len(r["blocks"]))):
            if r["held"][i][0] is None and r["blocks"][i] not in self.known:
                r["held"][i][0] = r["blocks"][i]
                self.known[r["blocks"][i]] = r["held"][i]

    def preempt(self) -> None:
        r = self.running.pop()
        self.free_all(r)
        r["computed"] = 0
        self.preemptions += 1
        self.waiting.insert(0, r)

    def step(self, now_s: float = 0.0, rows: Sequence[dict] = ()) -> float:
        """Schedule one step and carry it out; its duration, 0 when there is nothing to do."""
        size, budget, preempted = self.p.block_tokens, self.p.step_tokens, False
        decoding = [r for r in self.running if r["computed"] >= r["target"]]
        while True:
            decoding = [r for r in self.running if r["computed"] >= r["target"]]
            room = [r["computed"] + 1 + self.drafted for r in decoding]
            needs = [max(0, -(-n // size) - len(r["held"])) for r, n in zip(decoding, room, strict=True)]
            if sum(needs) <= len(self.free):
                break
            self.preempt()
            preempted = True
        for r, need in zip(decoding, needs, strict=True):
            r["held"] += [self.take() for _ in range(need)]
        budget = max(0, budget - len(decoding) * (1 + self.drafted))
        prefill = 0
        chunks: list[tuple[dict, int]] = []
        for r in self.running:
            if r["computed"] < r["target"]:
                n = min(budget - prefill, r["target"] - r["computed"])
                chunks.append((r, n))
                prefill += n
                self.remember(r, r["computed"] + n)
        while self.waiting and not preempted and prefill < budget:
            if len(self.running) >= self.p.max_sequences:
                break
            r = self.waiting[0]
            target = r["prompt"] + r["out"]
            hits: list[list] = []
            for h in r["blocks"][: (target - 1) // size]:
                if h not in self.known:
                    break
                hits.append(self.known[h])
            need = -(-target // size) - len(hits)
            if need > len(self.free) - sum(1 for b in hits if not b[1]):
                break
            self.waiting.pop(0)
            self.running.append(r)
            for b in hits:
                if not b[1]:
                    self.free.remove(b)
                b[1] += 1
            r["held"] = hits + [self.take() for _ in range(need)]
            r["target"], r["computed"], r["steps"] = target, len(hits) * size, 0
            if r["hit"] is None:
                r["hit"] = r["computed"]
            n = min(budget - prefill, target - r["computed"])
            chunks.append((r, n))
            prefill += n
            self.remember(r, r["computed"] + n)
        self.steps.append((now_s, self.p.kv_blocks - len(self.free), [r["out"] for r in rows]))
        if not self.running:
            return 0.0
        seconds = self.seconds(decoding, chunks)
        for r in decoding:
            tokens = min(r["draft"].tokens(self.done), r["max"] - r["out"]) if self.drafted else 1
            r["computed"] += tokens
            r["out"] += tokens
            r["steps"] += 1
        for r, n in chunks:
            r["computed"] += n
            if r["computed"] == r["target"]:
                r["out"] += 1
                if self.drafted and r["draft"] is None:
                    r["draft"] = self.drafts.draw()
        self.done += 1
        return seconds

    def seconds(self, decoding: list[dict], chunks: list[tuple[dict, int]]) -> float:
        """Duration of a step, added up token by token."""
        p, v = self.p, self.p.variants
        each = [r["draft"].tokens_per_step if self.drafted else 1 for r in decoding]
        context = sum(r["target"] + 1 + r["steps"] * n for r, n in zip(decoding, each, strict=True))
        sequences, stall_s = len(decoding), 0.0
        prefill_s = sum(
            (1 + (r["computed"] + i) / (v.prefill_doubling_tokens or math.inf)) / p.prefill_tokens_per_s
            for r, n in chunks
            for i in range(n)
        )
        if v.batch_buckets == "cuda-graph" and sequences and not prefill_s:
            sequences = next(n for n in (1, 2, 4, 8, 16) if n >= sequences)
        if v.batch_buckets == "hpu" and sequences:
            blocks = math.ceil(context / p.block_tokens)
            sequences = next(n for n in (1, 2, 4, 8, 16, 32) if n >= sequences)
            blocks = next(n for n in (1, 2, 4, 8, 16, 32, 64, *range(128, 4096, 128)) if n >= blocks)
            context = blocks * p.block_tokens
            if (sequences, blocks) not in self.compiled:
                self.compiled.add((sequences, blocks))
                stall_s = v.recompile_s
        seconds = p.base_s + p.sequence_s * sequences + p.context_token_s * context
        if decoding:
            seconds *= 1 + self.drafted * v.draft_cost
        if prefill_s:
            seconds += prefill_s + p.prefill_step_s
        return stall_s + seconds * (self.jitter.factor(self.done) if v.step_jitter else 1)

    def reap(self, now_s: float) -> None:
        for r in list(self.running):
            if r["computed"] >= r["target"] and r["out"] == 1 and r["first"] is None:
                r["first"] = now_s
            if r["out"] >= r["max"]:
                r["end"] = now_s
                self.running.remove(r)
                self.free_all(r)


Job = tuple[float, int, int, int, float]
"""Arrival, family, prompt tokens, output tokens, seconds until cancelled (infinite: never)."""


def by_steps(p: EngineParameters, jobs: Sequence[Job]) -> tuple[Slow, list[dict]]:
    slow = Slow(p)
    rows = [
        {
            "blocks": blocks_of(family, prompt, i),
            "prompt": prompt,
            "max": out,
            "out": 0,
            "computed": 0,
            "target": 0,
            "steps": 0,
            "draft": None,
            "held": [],
            "hit": None,
            "first": None,
            "end": None,
        }
        for i, (_, family, prompt, out, _) in enumerate(jobs)
    ]
    events = sorted((job[0], i) for i, job in enumerate(jobs))
    now_s = 0.0
    while True:
        while events and events[0][0] <= now_s:
            slow.waiting.append(rows[events.pop(0)[1]])
        seconds = slow.step(now_s, rows)
        if seconds:
            now_s += seconds
            slow.reap(now_s)
        elif events:
            now_s = events[0][0]
        else:
            return slow, rows


Seen = tuple[int, list[int]]
"""Blocks held, and each request's tokens out."""


def by_runs(
    p: EngineParameters,
    jobs: Sequence[Job],
    looks: Sequence[float] = (),
    seen: list[Seen] | None = None,
) -> tuple[Engine, list[EngineRequest]]:
    """``seen``: what was so at the times ``looks``."""
    engine = Engine(p)
    requests = [
        EngineRequest(blocks_of(family, prompt, i), prompt, out)
        for i, (_, family, prompt, out, _) in enumerate(jobs)
    ]
    events = [(job[0], i, 0) for i, job in enumerate(jobs)]
    events += [(job[0] + job[4], i, 1) for i, job in enumerate(jobs) if math.isfinite(job[4])]
    events += [(look_s, -1, 2) for look_s in looks]
    events.sort()
    now_s = 0.0
    while True:
        assert engine.kv.used_blocks <= engine.kv.blocks
        assert len(engine.running) <= p.max_sequences
        while events and events[0][0] <= now_s and events[0][0] < engine.due_s:
            _, i, kind = events.pop(0)
            if kind == 0:
                engine.submit(requests[i], now_s)
            elif kind == 1:
                engine.cancel(requests[i], now_s)
            else:
                engine.observe(now_s)
                if seen is not None:
                    seen.append((engine.kv.used_blocks, [engine.generated(r) for r in requests]))
        if engine.idle:
            engine.start(now_s)
        next_s = min(engine.due_s, events[0][0] if events else math.inf)
        if math.isinf(next_s):
            return engine, requests
        now_s = next_s
        if now_s == engine.due_s:
            engine.finish()


jobs = st.lists(
    st.tuples(
        st.floats(0, 0.5).map(lambda s: round(s, 4) + 1.234e-6),
        st.integers(0, 3),
        st.integers(1, 90),
        st.integers(1, 40),
        st.just(math.inf),
    ),
    min_size=1,
    max_size=14,
)


EVERYTHING = Variants(
    batch_buckets="hpu",
    recompile_s=0.02,
    num_speculative_tokens=3,
    prefill_doubling_tokens=50,
    step_jitter=0.1,
    seed=5,
)
VARIANTS = {
    "plain": Variants(),
    "cuda-graph": Variants(batch_buckets="cuda-graph"),
    "hpu": Variants(batch_buckets="hpu", recompile_s=0.05),
    "speculative": Variants(num_speculative_tokens=4, seed=1),
    "rarely-accepted": Variants(num_speculative_tokens=1, draft_acceptance=(1, 3), draft_cost=0.2),
    "long-context": Variants(prefill_doubling_tokens=30),
    "jitter": Variants(step_jitter=0.3, seed=2),
    "everything": EVERYTHING,
}


@settings(max_examples=60, deadline=None)
@given(jobs, st.sampled_from([128, 160, 400, 4096]), st.sampled_from([3, 8]), st.sampled_from([16, 64]))
@pytest.mark.parametrize("name", VARIANTS)
def test_runs_in_closed_form_equal_single_steps_on_single_blocks(
    name: str, jobs: list[Job], kv_tokens: int, max_sequences: int, step_tokens: int
) -> None:
    p = parameters(
        kv_tokens=kv_tokens,
        max_sequences=max_sequences,
        step_tokens=step_tokens,
        variants=VARIANTS[name],
    )
    jobs = [job for job in jobs if Engine(p).fits(job[2], job[3])]
    # None arrives just when another's step ends: rounding would decide which of the two comes first.
    jobs = [(arrival_s + i * 3.1e-8, *rest) for i, (arrival_s, *rest) in enumerate(jobs)]  # type: ignore[misc]
    slow, rows = by_steps(p, jobs)
    engine, requests = by_runs(p, jobs)
    assert [r.cached_tokens for r in requests] == [row["hit"] for row in rows]
    assert [r.first_token_s for r in requests] == pytest.approx([row["first"] for row in rows], abs=1e-9)
    assert [r.ended_s for r in requests] == pytest.approx([row["end"] for row in rows], abs=1e-9)
    assert engine.preemptions == slow.preemptions
    assert engine.step == slow.done
    assert engine.generated_tokens == sum(job[3] for job in jobs)
    assert engine.kv.cached_blocks == len(slow.known)


cancelled_jobs = st.lists(
    st.tuples(
        st.floats(0, 0.5), st.integers(0, 3), st.integers(1, 90), st.integers(0, 40), st.floats(0, 0.4)
    ),
    min_size=1,
    max_size=14,
)
variants = st.sampled_from([Variants(), EVERYTHING])


@settings(max_examples=100, deadline=None)
@given(cancelled_jobs, st.sampled_from([160, 4096]), variants)
def test_every_request_ends_once_and_gives_everything_back(
    jobs: list[Job], kv_tokens: int, variants: Variants
) -> None:
    p = parameters(kv_tokens=kv_tokens, variants=variants)
    engine, requests = by_runs(p, jobs)
    assert all(r.phase is Phase.DONE and math.isfinite(r.ended_s) for r in requests)
    assert all(not engine.cancel(r, 99.0) for r in requests)
    assert engine.kv.used_blocks == engine.decoding == engine.context_tokens == 0
    assert not engine.waiting
    assert not engine.running
    engine.kv.clear()
    assert engine.kv.cached_blocks == 0
    assert engine.kv.available_blocks == engine.kv.blocks


looks = st.lists(st.floats(0, 1).map(lambda s: round(s, 4) + 4.321e-7), min_size=1, max_size=10)


@settings(max_examples=100, deadline=None)
@given(jobs, looks, st.sampled_from([160, 4096]), variants)
def test_who_looks_sees_the_steps_that_are_over(
    jobs: list[Job], looks: list[float], kv_tokens: int, variants: Variants
) -> None:
    p = parameters(kv_tokens=kv_tokens, variants=variants)
    slow, _ = by_steps(p, jobs)
    seen: list[Seen] = []
    by_runs(p, jobs, looks, seen)
    for look_s, (used_blocks, generated) in zip(sorted(looks), seen, strict=True):
        began = [step for step in slow.steps if step[0] <= look_s]
        assert (used_blocks, generated) == (began[-1][1:] if began else (0, [0] * len(jobs)))


@settings(max_examples=100, deadline=None)
@given(cancelled_jobs, looks, variants)
def test_looking_changes_nothing(jobs: list[Job], looks: list[float], variants: Variants) -> None:
    ends = []
    for at in ((), looks):
        engine, requests = by_runs(parameters(kv_tokens=160, variants=variants), jobs, at)
        ends.append([(r.first_token_s, r.ended_s, r.preemptions, engine.generated(r)) for r in requests])
    assert repr(ends[0]) == repr(ends[1])  # to the last bit; some are nan


def test_a_look_into_a_long_run_leaves_its_end() -> None:
    engine = Engine(parameters())
    request = EngineRequest((), 10, 1000)
    engine.submit(request, 0.0)
    engine.start(0.0)
    now_s = engine.due_s
    engine.finish()
    engine.start(now_s)
    due_s = engine.due_s
    engine.observe((now_s + due_s) / 2)
    half = engine.generated(request)
    assert 490 < half < 510
    assert engine.generated_tokens == half
    assert engine.step == half
    assert engine.kv_usage == pytest.approx((10 + half) / 4096, abs=2e-3)
    assert engine.due_s == due_s
    assert engine.finish().steps == 999


def test_a_reset_loses_sequences_cache_and_counters() -> None:
    engine = Engine(parameters(max_sequences=1))
    running, waiting = (EngineRequest(blocks_of(0, 40, 0), 40, 100) for _ in range(2))
    engine.submit(running, 0.0)
    engine.submit(waiting, 0.0)
    engine.start(0.0)
    now_s = engine.due_s
    engine.finish()
    engine.start(now_s)
    assert engine.reset(0.5) == [running, waiting]
    assert running.phase is waiting.phase is Phase.DONE
    assert (running.ended_s, waiting.ended_s) == (0.5, 0.5)
    assert engine.generated(running) > 30
    assert not engine.cancel(running, 0.6)
    assert engine.idle
    assert math.isinf(engine.due_s)
    assert engine.kv.cached_blocks == engine.kv.used_blocks == engine.step == engine.generated_tokens == 0
    again = EngineRequest(blocks_of(0, 40, 0), 40, 2)
    engine.submit(again, 1.0)
    run_until_idle(engine, 1.0)
    assert again.phase is Phase.DONE
    assert again.cached_tokens == 0


@pytest.mark.parametrize("accelerator", ACCELERATORS)
def test_step_time_is_the_published_formula(accelerator: str) -> None:
    p = PARAMETERS[accelerator, GRANITE]
    engine = Engine(p)
    engine.submit(EngineRequest((), 1000, 3), 0.0)
    engine.submit(EngineRequest((), 200, 3), 0.0)
    engine.start(0.0)
    prefill_s = p.base_s + 1200 / p.prefill_tokens_per_s + p.prefill_step_s
    assert engine.due_s == pytest.approx(prefill_s, rel=1e-12)
    engine.finish()
    engine.start(prefill_s, max_steps=1)
    assert engine.due_s - prefill_s == pytest.approx(
        p.base_s + 2 * p.sequence_s + (1001 + 201) * p.context_token_s, rel=1e-12
    )
    now_s = engine.due_s
    engine.finish()
    engine.start(now_s)
    assert engine.due_s - now_s == pytest.approx(
        p.base_s + 2 * p.sequence_s + (1002 + 202) * p.context_token_s, rel=1e-12
    )


def test_a_prompt_seen_before_hits_all_but_its_last_token() -> None:
    for tokens, hit in ((3, 0), (4, 0), (5, 4), (16, 12), (17, 16)):
        engine = Engine(parameters())
        first, second = (EngineRequest(blocks_of(0, tokens, 0), tokens, 1) for _ in range(2))
        engine.submit(first, 0.0)
        now_s, _ = run_until_idle(engine)
        engine.submit(second, now_s)
        run_until_idle(engine, now_s)
        assert (first.cached_tokens, second.cached_tokens) == (0, hit)


def test_equal_prompts_of_one_step_share_their_blocks() -> None:
    engine = Engine(parameters(step_tokens=8192))
    for _ in range(6):
        engine.submit(EngineRequest(blocks_of(0, 41, 0), 41, 4), 0.0)
    engine.start(0.0)
    assert engine.kv.used_blocks == 10 + 6
    assert engine.cache_hits_tokens == 5 * 40


def test_an_output_can_be_found_again_by_the_next_turn() -> None:
    engine = Engine(parameters())
    prompt = blocks_of(0, 18, 0)
    reply = [101, 102, 103]
    first = EngineRequest(prompt, 18, 11, continuation=lambda tokens: reply[: tokens // 4 - len(prompt)])
    engine.submit(first, 0.0)
    now_s, _ = run_until_idle(engine)
    second = EngineRequest([*prompt, *reply, 104], 33, 1)
    engine.submit(second, now_s)
    run_until_idle(engine, now_s)
    assert second.cached_tokens == 28  # 18 + 11 tokens, of which the last never was in the KV cache


def test_an_arrival_waits_for_the_step_under_way_only() -> None:
    engine = Engine(parameters())
    engine.submit(EngineRequest((), 10, 1000), 0.0)
    engine.start(0.0)
    engine.finish()
    engine.start(1.0)
    far_s = engine.due_s
    late = EngineRequest((), 10, 1)
    engine.submit(late, 1.1)
    assert 1.1 < engine.due_s < 1.1 + 9e-3
    assert far_s > 8.0
    now_s = engine.due_s
    engine.finish()
    engine.start(now_s)
    engine.finish()
    assert late.first_token_s < 1.1 + 2 * 9e-3 + 6e-3


def test_a_cancelled_request_frees_its_blocks_at_once() -> None:
    engine = Engine(parameters())
    request = EngineRequest((), 400, 100)
    engine.submit(request, 0.0)
    engine.start(0.0)
    assert engine.kv.used_blocks == 100
    due_s = engine.due_s
    assert engine.cancel(request, 0.001)
    assert engine.kv.used_blocks == 0
    assert engine.due_s == due_s
    assert not engine.finish().finished


def test_the_newest_is_preempted_and_recomputed() -> None:
    engine = Engine(parameters(kv_tokens=64))
    old, new = EngineRequest((), 24, 30), EngineRequest((), 24, 30)
    engine.submit(old, 0.0)
    engine.submit(new, 0.0)
    run_until_idle(engine)
    assert (old.preemptions, new.preemptions) == (0, 1)
    assert old.ended_s < new.ended_s
    assert engine.generated_tokens == 60


def test_slowdown_stretches_the_steps_that_begin_later() -> None:
    plain, slowed = Engine(parameters()), Engine(parameters())
    slowed.slowdown = 3.0
    ends = []
    for engine in (plain, slowed):
        engine.submit(EngineRequest((), 10, 50), 0.0)
        ends.append(run_until_idle(engine)[0])
    assert ends[1] == pytest.approx(3 * ends[0])


@pytest.mark.parametrize("variants", [Variants(), EVERYTHING])
def test_max_steps_only_divides_the_runs(variants: Variants) -> None:
    rng = random.Random(3)
    prompts = [(rng.randint(1, 80), rng.randint(1, 60)) for _ in range(20)]
    ends = []
    for most in (1, 3, 1 << 40):
        engine = Engine(parameters(kv_tokens=320, variants=variants))
        requests = [EngineRequest((), p, o) for p, o in prompts]
        for request in requests:
            engine.submit(request, 0.0)
        _, runs = run_until_idle(engine, max_steps=most)
        assert all(ran.steps <= most for ran in runs)
        ends.append([r.ended_s for r in requests])
    assert ends[1] == pytest.approx(ends[0])
    assert ends[2] == pytest.approx(ends[0])


def busy(variants: Variants, seconds: float = 3.0, **changes: object) -> tuple[Engine, list[tuple]]:
    """An H100 with Poisson arrivals, and what became of each request."""
    rng = random.Random(11)
    p = structs.replace(PARAMETERS["h100-nvl", GRANITE], variants=variants, **changes)
    jobs, now_s = [], 0.0
    while (now_s := now_s + rng.expovariate(12)) < seconds:
        jobs.append((now_s, rng.randrange(4), rng.randrange(1, 9000), rng.randrange(1, 600), math.inf))
    engine, requests = by_runs(p, jobs)
    return engine, [(r.cached_tokens, r.first_token_s, r.ended_s, r.preemptions) for r in requests]


@pytest.mark.parametrize("name", VARIANTS)
def test_one_seed_gives_the_same_to_the_last_bit(name: str) -> None:
    assert repr(busy(VARIANTS[name])[1]) == repr(busy(VARIANTS[name])[1])
    other = structs.replace(VARIANTS[name], seed=99)
    assert (busy(other)[1] == busy(VARIANTS[name])[1]) is not VARIANTS[name].random


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "plain"])
def test_every_variant_changes_what_the_plain_engine_does(name: str) -> None:
    assert busy(VARIANTS[name])[1] != busy(Variants())[1]


def test_speculation_takes_fewer_and_dearer_steps() -> None:
    plain, speculative = Engine(parameters()), Engine(parameters(variants=VARIANTS["speculative"]))
    ends_s = []
    for engine in (plain, speculative):
        for _ in range(8):
            engine.submit(EngineRequest((), 20, 400), 0.0)
        ends_s.append(run_until_idle(engine)[0])
    assert speculative.generated_tokens == plain.generated_tokens == 8 * 400
    assert plain.step / 5 < speculative.step < plain.step / 1.5
    assert ends_s[1] < ends_s[0]
    assert ends_s[1] / speculative.step == pytest.approx(1.12 * ends_s[0] / plain.step, rel=0.05)


@pytest.mark.parametrize("sequences", [1, 7, 60])
def test_a_budget_of_2048_chunks_every_prompt_and_leaves_decoding_its_tokens(sequences: int) -> None:
    engine = Engine(structs.replace(PARAMETERS["h100-nvl", GRANITE], step_tokens=2048))
    for _ in range(sequences):
        engine.submit(EngineRequest((), 5000, 50), 0.0)
    _, runs = run_until_idle(engine)
    assert sum(ran.prefill_tokens for ran in runs) == 5000 * sequences
    assert max(ran.prefill_tokens + ran.decoding for ran in runs) == 2048
    assert [ran.prefill_tokens for ran in runs[:2]] == [2048, 2048]
    assert engine.generated_tokens == 50 * sequences
