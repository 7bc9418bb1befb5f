"""How long steps last: each variant against what it says of itself."""

from __future__ import annotations

import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from pointsman.sim.batch import PlainBatch
from pointsman.sim.buckets import CUDA_GRAPH_SIZES, CudaGraphs, HpuBuckets, hpu_bucket
from pointsman.sim.drafts import Draft, Drafts
from pointsman.sim.jitter import Jitter
from pointsman.sim.profiles import GRANITE, PARAMETERS
from pointsman.sim.step_cost import Run, StepCost
from pointsman.sim.variants import Variants

H100 = PARAMETERS["h100-nvl", GRANITE]
GAUDI = PARAMETERS["gaudi3", GRANITE]


def cost(**variants: object) -> StepCost:
    return StepCost(structs.replace(H100, variants=Variants(**variants)))


def batch(sequences: int, context_tokens: int) -> PlainBatch:
    batch = PlainBatch(16)
    batch.sequences, batch.context_tokens = sequences, context_tokens
    return batch


# runs


@pytest.mark.parametrize("jitter", [None, Jitter(0.2, 7)])
def test_a_run_is_the_sum_of_its_steps(jitter: Jitter | None) -> None:
    run = Run(0.01, 1e-6, jitter=jitter, step=12, stall_s=0.5)
    factors = [jitter.factor(12 + i) if jitter else 1.0 for i in range(300)]
    ends_s = [0.5 + sum((0.01 + 1e-6 * i) * factors[i] for i in range(n)) for n in range(301)]
    assert [run.seconds(n) for n in range(301)] == pytest.approx(ends_s, rel=1e-12)
    for n in (1, 17, 299):
        assert run.steps_within(ends_s[n] + 1e-9) == n
        assert run.steps_within(ends_s[n] - 1e-9) == n - 1
    assert run.steps_within(0.4) == 0


# buckets


def test_cuda_graphs_pad_to_the_next_captured_size() -> None:
    padded = {n: CudaGraphs().pad(n, 1000, n, False).sequences for n in (1, 3, 4, 5, 9, 250, 257, 512, 513)}
    assert padded == {1: 1, 3: 4, 4: 4, 5: 8, 9: 16, 250: 256, 257: 272, 512: 512, 513: 513}
    assert CUDA_GRAPH_SIZES[-1] == 512
    assert CudaGraphs().pad(9, 1000, 9, True).sequences == 9


def test_a_padded_batch_costs_what_the_larger_one_costs() -> None:
    graphs = cost(batch_buckets="cuda-graph")
    assert graphs.run(batch(17, 5000), 0).seconds(1) == cost().run(batch(24, 5000), 0).seconds(1)
    assert graphs.run(batch(17, 5000), 100).seconds(1) == cost().run(batch(17, 5000), 100).seconds(1)


def test_hpu_buckets_are_powers_of_two_then_steps() -> None:
    assert [hpu_bucket(n, 32) for n in (1, 2, 3, 9, 17, 31, 32, 33, 65)] == [1, 2, 4, 16, 32, 32, 32, 64, 96]


def test_hpu_pads_context_until_it_outgrows_its_bucket() -> None:
    buckets = HpuBuckets(128, 0.0)
    padded = buckets.pad(20, 127 * 128 + 1, 20, False)
    assert (padded.sequences, padded.context_tokens, padded.growth_tokens) == (32, 128 * 128, 0)
    assert padded.steps == 1 + 127 // 20
    behind = buckets.pad(20, 127 * 128 + 1 + 20 * padded.steps, 20, False)
    assert behind.context_tokens == 256 * 128


def test_a_bucket_is_compiled_when_first_met() -> None:
    slow = StepCost(structs.replace(GAUDI, variants=Variants(batch_buckets="hpu", recompile_s=4.0)))
    warm = StepCost(structs.replace(GAUDI, variants=Variants(batch_buckets="hpu")))
    sizes = [(20, 9000), (20, 9000), (30, 9100), (40, 9100), (20, 9000)]  # 30 is in the bucket of 20
    stalls = [slow.run(batch(*s), 0).seconds(1) - warm.run(batch(*s), 0).seconds(1) for s in sizes]
    assert stalls == pytest.approx([4.0, 0.0, 0.0, 4.0, 0.0])


# prefill


def test_prefill_gets_dearer_along_the_context() -> None:
    quadratic = cost(prefill_doubling_tokens=20_000)
    assert cost().prefill(30_000, 2048) == 2048
    assert quadratic.prefill(0, 1) == 1
    assert quadratic.prefill(20_000, 1) == 2
    assert quadratic.prefill(0, 20_001) == pytest.approx(20_001 * 1.5)
    chunks = sum(quadratic.prefill(at, 2048) for at in range(0, 20_480, 2048))
    assert chunks == pytest.approx(quadratic.prefill(0, 20_480), rel=1e-12)
    assert quadratic.run(batch(0, 0), quadratic.prefill(20_000, 1000)).seconds(1) == pytest.approx(
        H100.base_s + H100.prefill_step_s + 1000 * 2.024975 / H100.prefill_tokens_per_s
    )


# jitter


def test_jitter_has_mean_one_and_the_deviation_asked_for() -> None:
    jitter = Jitter(0.1, 3)
    factors = [jitter.factor(step) for step in range(1 << 14)]
    assert statistics.fmean(factors) == pytest.approx(1, abs=1e-12)
    assert statistics.pstdev(factors) == pytest.approx(0.1, rel=0.03)
    lag_1 = statistics.correlation(factors[:-1], factors[1:])
    assert abs(lag_1) < 0.03


@given(st.integers(0, 60_000), st.integers(0, 60_000))
def test_jitter_sums_up_over_any_steps(step: int, steps: int) -> None:
    jitter = Jitter(0.3, 3)
    total, moment = jitter.sums(step, steps)
    half = steps // 2
    first, second = jitter.sums(step, half), jitter.sums(step + half, steps - half)
    assert total == pytest.approx(first[0] + second[0], rel=1e-9, abs=1e-9)
    assert moment == pytest.approx(first[1] + second[1] + half * second[0], rel=1e-9, abs=1e-6)
    assert jitter.sums(step, 1)[0] == pytest.approx(jitter.factor(step), rel=1e-9)


# speculative decoding


@pytest.mark.parametrize(("rate", "drafted"), [(0, 3), (16, 1), (22, 3), (28, 8), (32, 4)])
def test_a_step_brings_the_published_number_of_tokens(rate: int, drafted: int) -> None:
    draft = Draft(rate, drafted, 100)
    a = rate / 32
    expected = drafted + 1 if a == 1 else (1 - a ** (drafted + 1)) / (1 - a)
    tokens = [draft.tokens(step) for step in range(4096)]
    assert draft.acceptance == a
    assert set(tokens) <= set(range(1, drafted + 2))
    assert statistics.fmean(tokens) == pytest.approx(expected, rel=0.04)
    assert draft.tokens_per_step == statistics.fmean(tokens)


@given(st.integers(0, 32), st.integers(0, 4095), st.integers(0, 9000), st.integers(1, 30_000))
def test_tokens_are_out_at_the_first_step_that_reaches_them(
    rate: int, place: int, step: int, tokens: int
) -> None:
    draft = Draft(rate, 3, place)
    reached = draft.reached(step, tokens)
    assert draft.before(reached) - draft.before(step) >= tokens
    assert draft.before(reached - 1) - draft.before(step) < tokens


def test_acceptance_varies_from_request_to_request() -> None:
    drafts = Drafts(Variants(num_speculative_tokens=3, draft_acceptance=(7, 3)))
    rates = [drafts.draw().acceptance for _ in range(2000)]
    assert statistics.fmean(rates) == pytest.approx(0.7, abs=0.01)
    assert statistics.pstdev(rates) == pytest.approx((0.7 * 0.3 / 11) ** 0.5, rel=0.05)


def test_drafting_makes_a_decode_step_dearer_and_leaves_prefill() -> None:
    speculative, rng = cost(num_speculative_tokens=4, draft_cost=0.05), random.Random(1)
    for _ in range(20):
        size = rng.randrange(1, 200), rng.randrange(1, 100_000)
        plain_s = cost().run(batch(*size), 0).seconds(9)
        assert speculative.run(batch(*size), 0).seconds(9) == pytest.approx(1.2 * plain_s)
    assert speculative.run(batch(0, 0), 500).seconds(1) == cost().run(batch(0, 0), 500).seconds(1)
