"""CPU time of the engine model alone, plain and with each variant: no router, no metrics, no workload.

``python bench/micro/engine_model.py`` sends the case study's prompts (150 groups of 5, 7,200 tokens in, 1,000
out) in a ladder of eight stages of 30 s to its 20 endpoints, chosen at random by weight, and 1,000 req/s to
1,000 endpoints; per variant it prints the least of ``--runs`` runs. CPU seconds, one core.
"""

from __future__ import annotations

import argparse
import heapq
import math
import random
import time
from collections.abc import Mapping, Sequence

from pointsman.sim.engine import Engine, EngineRequest
from pointsman.sim.spec import FleetItem, expand

LADDER = (25, 40, 55, 70, 85, 85, 100, 120)
STAGE_S = 30
POOL = (("h100-nvl", 4, 5), ("mi325x", 8, 5), ("gaudi3", 8, 2))
"""Accelerator, how many, weight."""
GROUPS, QUESTIONS, SHARED, PROMPT, OUTPUT = 150, 5, 6000, 7200, 1000
EACH: Sequence[Mapping[str, object]] = (
    {"batch_buckets": "cuda-graph"},
    {"batch_buckets": "hpu", "recompile_s": 2},
    {"num_speculative_tokens": 3},
    {"prefill_doubling_tokens": 24_000},
    {"step_jitter": 0.1},
    {"max_num_batched_tokens": 2048},
    {"kv_scale": 0.7},
)
ALL = {key: value for variant in EACH[1:] for key, value in variant.items()}

Call = tuple[float, int, Sequence[int]]
"""Arrival, engine, the prompt's block hashes."""


def fleet(variant: Mapping[str, object], size: int) -> list[Engine]:
    items = [FleetItem(accelerator=name, count=count * size, **variant) for name, count, _ in POOL]
    return [Engine(spec.parameters()) for spec in expand(items)]


def load(engines: Sequence[Engine], rates: Sequence[float], size: int) -> list[Call]:
    """Poisson arrivals, ``rates`` one stage after the other."""
    rng = random.Random(1)
    weights = [weight for _, count, weight in POOL for _ in range(count * size)]
    chains: dict[tuple[int, int, int], list[int]] = {}
    calls = []
    for stage, rate in enumerate(rates):
        at_s = stage * STAGE_S + rng.expovariate(rate)
        while at_s < (stage + 1) * STAGE_S:
            group, question = rng.randrange(GROUPS * size), rng.randrange(QUESTIONS)
            (place,) = rng.choices(range(len(engines)), weights)
            block = engines[place].parameters.block_tokens
            key = (group, question, block)
            if key not in chains:
                shared = SHARED // block
                chains[key] = [hash((group, i, question * (i >= shared))) for i in range(PROMPT // block)]
            calls.append((at_s, place, chains[key]))
            at_s += rng.expovariate(rate)
    return calls


def run(engines: Sequence[Engine], calls: Sequence[Call]) -> None:
    """Until everything is answered."""
    due: list[tuple[float, int]] = []
    armed = [math.inf] * len(engines)
    coming = iter(calls)
    call = next(coming, None)
    while call is not None or due:
        if call is not None and (not due or call[0] <= due[0][0]):
            now_s, place, chain = call
            engine = engines[place]
            engine.submit(EngineRequest(chain, PROMPT, OUTPUT), now_s)
            if engine.idle:
                engine.start(now_s)
            call = next(coming, None)
        else:
            now_s, place = heapq.heappop(due)
            if now_s != armed[place]:
                continue
            engine = engines[place]
            engine.finish()
            engine.start(now_s)
        if engine.due_s != armed[place]:
            armed[place] = engine.due_s
            if engine.due_s < math.inf:
                heapq.heappush(due, (engine.due_s, place))


def seconds(variant: Mapping[str, object], rates: Sequence[float], size: int, runs: int) -> tuple[float, int]:
    """The fastest of ``runs``, and how many steps the engines took."""
    best = math.inf
    for _ in range(runs):
        engines = fleet(variant, size)
        calls = load(engines, rates, size)
        began_s = time.process_time()
        run(engines, calls)
        best = min(best, time.process_time() - began_s)
        assert sum(engine.generated_tokens for engine in engines) == OUTPUT * len(calls)
    return best, sum(engine.step for engine in engines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    print(f"{'variant':<80} {'20, ladder':>17} {'1,000 at 1,000/s':>18}")
    for variant in ({}, *EACH, ALL):
        name = " ".join(f"{key}={value}" for key, value in variant.items()) or "plain"
        ladder_s, steps = seconds(variant, LADDER, 1, args.runs)
        large_s, _ = seconds(variant, (1000,), 50, args.runs)
        if len(name) > 80:
            name = "all but cuda-graph"
        print(f"{name:<80} {ladder_s:>6.2f} s {steps:>8,} {large_s:>14.2f} s", flush=True)


if __name__ == "__main__":
    main()
