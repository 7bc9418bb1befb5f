"""The cheapest mix of endpoints under which a recorded load keeps its SLO."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from statistics import fmean

import msgspec

from pointsman.bench.workloads.recorded import Recording
from pointsman.errors import SettingsError
from pointsman.sim.profiles import EngineParameters
from pointsman.twin.plan import SHARE_WITHIN_SLO, Result, Source, Task, keeps
from pointsman.twin.plan_fleet import Fleet, Kinds, of_counts
from pointsman.twin.policies import Policy

MOST_MIXES = 200_000
MOST_REPLAYS = 80

Counts = tuple[int, ...]
Replay = Callable[[Sequence[Task]], Sequence[Result]]
"""Makes some replays at once, and hands back their results in their order."""


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """How the search ended."""

    fleet: Fleet | None
    """None: no mix that was looked at keeps the SLO."""
    price: float | None
    replays: int
    mixes: int
    """That there are within bounds."""
    given_up: bool = False
    """The most replays were made; a fleet, if there is one, keeps the SLO but need not be the cheapest."""


class Search(msgspec.Struct, frozen=True, kw_only=True):
    """What is searched: of each kind from none to ``most``."""

    source: Source
    policy: Policy
    recorded: Fleet
    kinds: Kinds
    prices: Mapping[str, float]
    """Of an hour, by kind; only these are used."""
    most: Mapping[str, int]
    seeds: int = 1
    """All of which a mix has to keep the SLO with."""
    jobs: int = 1


def cheapest(search: Search, recording: Recording, replay: Replay) -> Found:
    """Mixes by price, those left out that cannot give so many tokens at all or are part of one that failed;
    the first that keeps the SLO. Where the largest one fails none of them holds.
    """
    names = tuple(search.prices)
    ranges = [range(search.most[name] + 1) for name in names]
    size = 1
    for numbers in ranges:
        size *= len(numbers)
    if size > MOST_MIXES:
        raise SettingsError(f"--cheapest: {size:,} mixes are too many; give --more a smaller number")
    largest = tuple(numbers[-1] for numbers in ranges)
    most_tok_s = [_most_tok_s(search, recording, name) for name in names]
    needed_tok_s = _needed_tok_s(search, recording)

    def enough(counts: Counts) -> bool:
        return sum(n * rate for n, rate in zip(counts, most_tok_s, strict=True)) >= needed_tok_s

    def price(counts: Counts) -> float:
        return sum(n * search.prices[name] for n, name in zip(counts, names, strict=True))

    def task(counts: Counts, seed: int = 0) -> Task:
        fleet = of_counts(search.recorded, dict(zip(names, counts, strict=True)), search.kinds)
        return Task(source=search.source, fleet=fleet, policy=search.policy, seed=seed, hopeless=True)

    def holds(results: Sequence[Result]) -> bool:
        return all(keeps(result, SHARE_WITHIN_SLO) for result in results)

    if not any(largest) or not holds(replay([task(largest)])):
        return Found(fleet=None, price=None, replays=1, mixes=size)
    replays, failed = 1, list[Counts]()
    left = sorted(filter(enough, product(*ranges)), key=lambda counts: (price(counts), sum(counts), counts))
    while left and replays < MOST_REPLAYS:
        batch, left = left[: search.jobs], left[search.jobs :]
        results = replay([task(counts) for counts in batch])
        replays += len(batch)
        for counts, result in zip(batch, results, strict=True):
            others = [task(counts, seed) for seed in range(1, search.seeds)] if holds([result]) else []
            replays += len(others)
            if holds([result]) and (not others or holds(replay(others))):
                return Found(fleet=task(counts).fleet, price=price(counts), replays=replays, mixes=size)
            failed.append(counts)
        left = [
            counts for counts in left if not any(_within(counts, worse) for worse in failed[-len(batch) :])
        ]
    return Found(
        fleet=task(largest).fleet, price=price(largest), replays=replays, mixes=size, given_up=bool(left)
    )


def _within(counts: Counts, other: Counts) -> bool:
    """Of no kind has it more than the other: what that one cannot do, it cannot."""
    return all(n <= m for n, m in zip(counts, other, strict=True))


def _needed_tok_s(search: Search, recording: Recording) -> float:
    requests = recording.requests
    span_s = (requests[-1].at_s - requests[0].at_s) / search.source.scale
    return sum(recording.output_tokens(r) for r in requests) / span_s if span_s else 0.0


def _most_tok_s(search: Search, recording: Recording, kind: str) -> float:
    """Output tokens a second of one endpoint at the very most: it does nothing but decode, every prompt is
    in its cache, and the batch is as large as the TPOT limit and the KV cache of the answers allow.
    """
    engine = search.kinds.find(kind).parameters()
    output = fmean(recording.output_tokens(r) for r in recording.requests)
    context = fmean(recording.prompt_tokens(r) for r in recording.requests) + output / 2
    sequences = min(float(engine.max_sequences), engine.kv_tokens / output)
    limit_s = search.source.slo.tpot_s
    if limit_s is not None:
        sequences = min(sequences, _sequences_within(engine, context, limit_s))
    return sequences / engine.step_s(1, context) if sequences < 1 else _rate(engine, sequences, context)


def _sequences_within(engine: EngineParameters, context: float, step_s: float) -> float:
    each_s = engine.sequence_s + engine.context_token_s * context
    return max(0.0, (step_s - engine.base_s) / each_s) if each_s else float("inf")


def _rate(engine: EngineParameters, sequences: float, context: float) -> float:
    step_s = engine.base_s + sequences * (engine.sequence_s + engine.context_token_s * context)
    return sequences / step_s
