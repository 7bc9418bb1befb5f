"""What a simulated stage amounts to: what clients saw, as ``bench`` reports it, and what only the twin
knows.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from operator import mul
from statistics import fmean

import msgspec
from msgspec import structs

from pointsman.bench.histogram import Percentiles, percentiles
from pointsman.bench.report import Bill, Slo, Stage, is_good, summarise, tpot_s
from pointsman.bench.stream import Gaps
from pointsman.twin.gateway import Served
from pointsman.twin.run import ServerFigures, StageRun

REFUSALS = (429, 503)
"""Statuses that say: full, come back later."""


class SloClass(msgspec.Struct, frozen=True, kw_only=True):
    """The requests of one SLO class."""

    requests: int
    within_slo: float
    """Share of them, failed ones included, that kept their class' SLO."""
    goodput: float
    """Those a second of makespan."""
    output_tok_s: float
    """Output tokens of those that ended well, by makespan of the stage."""
    request_shares: Mapping[str, float]
    """By accelerator."""
    ttft: Percentiles | None
    tpot: Percentiles | None


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """One endpoint, or all of one accelerator."""

    accelerator: str
    endpoints: int
    requests: int
    """That ended there, well or not."""
    request_share: float
    output_share: float
    """Of the output tokens of all requests that ended well."""
    prefix_hit_rate: float | None
    """Of the prompt tokens looked up in its prefix cache, by the engine's own count."""
    kv_usage_mean: float
    kv_usage_max: float
    """As its metrics said while it had requests; the mean of several is theirs, the maximum the highest."""
    preemptions: int
    refused: int
    """Times it answered 503 because its queue was full."""
    working: float
    """Share of the makespan in which it had requests; the mean of several."""


class Figures(Stage, frozen=True, kw_only=True):
    """One stage. ``prefix_hit_rate`` is the engines' own; ``within_slo`` and ``goodput`` judge each request
    by the SLO of its class.
    """

    predicted_cached_tokens: int
    """Prompt tokens that the router believed to be cached where it sent the answered requests;
    ``cached_tokens`` of them and of others were.
    """
    prediction_error_tokens: float | None
    """Mean of |predicted - cached| over the answered requests."""
    copies_per_prefix: float | None
    """Endpoints that served a group of prompts, so computed its prefix and held it: mean over the groups."""
    kv_usage_mean: float
    kv_usage_max: float
    preemptions: int
    refused: int
    """Requests that ended in 429 or 503."""
    timeouts: int
    """Requests whose client gave up."""
    retried: int
    """Requests that were sent to more than one endpoint."""
    working_tokens_per_unit: float | None
    """Output tokens for each currency unit when an endpoint costs only while it has requests: when the others
    can be given back.
    """
    working_tokens_per_kwh: float | None
    classes: Mapping[str, SloClass]
    """By name; requests without a class are under ``""``."""
    accelerators: Mapping[str, Part]
    parts: Mapping[str, Part]
    """By endpoint."""


class Spread(msgspec.Struct, frozen=True):
    """How the times [s] of the answered requests of a stage are spread: their 0th, 1st ... 100th percentile;
    empty when there are none.
    """

    ttft: tuple[float, ...]
    tpot: tuple[float, ...]


def spread(stage: StageRun) -> Spread:
    """For charts."""
    answered = [record for record in stage.records if not record.error]
    return Spread(
        _quantiles(r.first_s - r.due_s for r in answered),
        _quantiles(t for r in answered if (t := tpot_s(r)) is not None),
    )


def figures(stage: StageRun, slo_of: Callable[[str], Slo]) -> Figures:
    """The figures of a stage, each class judged by ``slo_of(class)``, which is asked once a class."""
    slo_of = cache(slo_of)
    records = stage.records
    seen = summarise(
        stage.load.name, records, Gaps(), bill=_bill(stage.servers), rate=stage.load.rate, mergeable=False
    )
    working = _working(records)
    working_s = [working.get(server.name, 0.0) for server in stage.servers]
    at_work = _bill(stage.servers, working_s)
    good = [is_good(record, slo_of(record.slo_class)) for record in records]
    answered = [record for record in records if not record.error]
    errors = [
        abs(r.matched_tokens - r.usage.cached_tokens) for r in answered if r.usage.cached_tokens is not None
    ]
    part = partial(_parts, records=records, working=working, makespan_s=seen.makespan_s)
    parts = part(stage.servers, by=lambda server: server.name)
    accelerators = {server.name: server.accelerator for server in stage.servers}
    own = structs.asdict(seen) | {
        "prefix_hit_rate": _hit_rate(stage.servers),
        "within_slo": sum(good) / len(records),
        "goodput": _per_s(sum(good), seen.makespan_s),
    }
    return Figures(
        **own,
        predicted_cached_tokens=sum(r.matched_tokens for r in answered),
        prediction_error_tokens=fmean(errors) if errors else None,
        copies_per_prefix=_copies(answered),
        kv_usage_mean=fmean(part.kv_usage_mean for part in parts.values()),
        kv_usage_max=max(part.kv_usage_max for part in parts.values()),
        preemptions=sum(server.preemptions for server in stage.servers),
        refused=sum(record.status in REFUSALS for record in records),
        timeouts=seen.errors.get("timeout", 0),
        retried=sum(record.tries > 1 for record in records),
        working_tokens_per_unit=at_work.tokens_per_unit(seen.output_tokens, 1.0),
        working_tokens_per_kwh=at_work.tokens_per_kwh(seen.output_tokens, 1.0),
        classes=_classes(records, good, seen.makespan_s, accelerators),
        accelerators=part(stage.servers, by=lambda server: server.accelerator),
        parts=parts,
    )


def _bill(servers: Sequence[ServerFigures], seconds: Sequence[float] = ()) -> Bill:
    """What they cost and draw together, each times its ``seconds`` where these are given; a figure that one
    of them lacks is not known.
    """
    times = seconds or [1.0] * len(servers)
    prices, watts = [s.price_per_hour for s in servers], [s.watts for s in servers]
    return Bill(
        sum(map(mul, prices, times)) if all(prices) else 0.0,
        sum(map(mul, watts, times)) if all(watts) else 0.0,
    )


def _working(records: Sequence[Served]) -> dict[str, float]:
    """Seconds in which an endpoint had requests that ended there."""
    until: dict[str, float] = {}
    found: defaultdict[str, float] = defaultdict(float)
    for record in sorted(records, key=lambda record: record.sent_s):
        name, start_s = record.endpoint, max(record.sent_s, until.get(record.endpoint, 0.0))
        if record.end_s > start_s:
            found[name] += record.end_s - start_s
            until[name] = record.end_s
    return dict(found)


def _classes(
    records: Sequence[Served], good: Sequence[bool], makespan_s: float, accelerators: Mapping[str, str]
) -> dict[str, SloClass]:
    groups: defaultdict[str, list[tuple[Served, bool]]] = defaultdict(list)
    for record, fine in zip(records, good, strict=True):
        groups[record.slo_class].append((record, fine))
    found = {}
    for name, group in sorted(groups.items()):
        kept = sum(fine for _, fine in group)
        ok = [record for record, _ in group if not record.error]
        served = Counter(accelerators[r.endpoint] for r, _ in group if r.endpoint in accelerators)
        found[name] = SloClass(
            requests=len(group),
            within_slo=kept / len(group),
            goodput=_per_s(kept, makespan_s),
            output_tok_s=_per_s(sum(r.usage.output_tokens or 0 for r in ok), makespan_s),
            request_shares={name: served[name] / len(group) for name in dict.fromkeys(accelerators.values())},
            ttft=percentiles((r.first_s - r.due_s for r in ok), mergeable=False),
            tpot=percentiles((t for r in ok if (t := tpot_s(r)) is not None), mergeable=False),
        )
    return found


def _parts(
    servers: Sequence[ServerFigures],
    records: Sequence[Served],
    working: Mapping[str, float],
    makespan_s: float,
    by: Callable[[ServerFigures], str],
) -> dict[str, Part]:
    requests = Counter(record.endpoint for record in records)
    output = max(1, sum(server.output_tokens for server in servers))
    groups: defaultdict[str, list[ServerFigures]] = defaultdict(list)
    for server in servers:
        groups[by(server)].append(server)
    found = {}
    for name, group in groups.items():
        sent = sum(requests[server.name] for server in group)
        found[name] = Part(
            accelerator=group[0].accelerator,
            endpoints=len(group),
            requests=sent,
            request_share=sent / len(records),
            output_share=sum(server.output_tokens for server in group) / output,
            prefix_hit_rate=_hit_rate(group),
            kv_usage_mean=fmean(server.kv_usage_mean for server in group),
            kv_usage_max=max(server.kv_usage_max for server in group),
            preemptions=sum(server.preemptions for server in group),
            refused=sum(server.refused for server in group),
            working=_per_s(fmean(working.get(server.name, 0.0) for server in group), makespan_s),
        )
    return found


def _hit_rate(servers: Sequence[ServerFigures]) -> float | None:
    looked_up = sum(server.prompt_tokens for server in servers)
    return sum(server.cached_tokens for server in servers) / looked_up if looked_up else None


def _copies(records: Sequence[Served]) -> float | None:
    served: defaultdict[int, set[str]] = defaultdict(set)
    for record in records:
        if record.group >= 0:
            served[record.group].add(record.endpoint)
    return fmean(map(len, served.values())) if served else None


def _quantiles(values: Iterable[float]) -> tuple[float, ...]:
    ascending = sorted(values)
    last = len(ascending) - 1
    return tuple(ascending[round(i * last / 100)] for i in range(101)) if ascending else ()


def _per_s(count: float, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
