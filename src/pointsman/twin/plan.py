"""What a recorded load would meet on another fleet: the trace replayed through the router's own code, on
engines as fast as was learned of those it ran on.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

import msgspec

from pointsman.bench.histogram import Percentiles, percentiles
from pointsman.bench.report import NO_SLO, Slo, tpot_s
from pointsman.bench.run import Load
from pointsman.bench.workloads import Trace
from pointsman.bench.workloads.recorded import Recording, read_recording
from pointsman.observability.trace import Ruled, Traced
from pointsman.twin.gateway import Served
from pointsman.twin.plan_fleet import Fleet
from pointsman.twin.policies import Policy
from pointsman.twin.run import Simulation
from pointsman.twin.scenario import Scenario
from pointsman.types import Ending

WARM_UP_SHARE = 0.1
MOST_WARM_UP_S = 60.0
"""Requests of so much of the beginning are sent but not counted: caches are cold in the replay."""
SHARE_WITHIN_SLO = 0.99


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """What is replayed, and how it is judged."""

    path: str
    last: int
    """Requests, the last ones of the trace."""
    scale: float = 1.0
    """Times as many requests a second."""
    slo: Slo = NO_SLO
    """Of requests that did not bring limits of their own."""


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """One replay."""

    source: Source
    fleet: Fleet
    policy: Policy
    seed: int = 0
    hopeless: bool = False
    """Break off as soon as the SLO can no more be kept."""


class Done(msgspec.Struct, frozen=True):
    """A request, recorded or replayed."""

    at_s: float
    end_s: float
    endpoint: str
    ttft_s: float | None
    """None where it cannot be seen: of answers that are not streamed."""
    tpot_s: float | None
    output_tokens: int
    ok: bool
    slo: Slo


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What clients saw. Times in seconds; None where there is nothing to tell."""

    requests: int
    ok: int
    output_tok_s: float
    """Until the last request has ended."""
    ttft: Percentiles | None
    """Of streams."""
    tpot: Percentiles | None
    within_slo: float | None
    """Share of the requests; None without limits."""
    requests_by_endpoint: Mapping[str, int]
    in_flight_by_endpoint: Mapping[str, float]
    """At once, on average."""
    broken_off: bool = False


def warm_up_s(recording: Recording) -> float:
    """Of recorded time."""
    requests = recording.requests
    return min(MOST_WARM_UP_S, WARM_UP_SHARE * (requests[-1].at_s - requests[0].at_s))


def policy_of(ruled: Ruled) -> Policy:
    """The policy that the trace was recorded under."""
    if ruled.picker_config is not None:
        return Policy(name="recorded policy", picker_config=ruled.picker_config)
    settings = {
        f"{plugin}.{key}": v for plugin, of_it in ruled.parameters.items() for key, v in of_it.items()
    }
    return Policy(name=ruled.preset, preset=ruled.preset).having(settings)


def recorded(recording: Recording, slo: Slo) -> Result:
    """What the trace says happened."""
    return _result([_of_trace(recording, request, slo) for request in _counted(recording)])


def replay(task: Task) -> Result:
    """What happens in the twin."""
    source = task.source
    recording = read_recording(source.path, source.last)
    requests = recording.requests
    skipped = len(requests) - len(_counted(recording))
    simulation = Simulation(_scenario(task, recording), task.policy, seed=task.seed)
    watch = _Hopeless(requests, skipped, source.slo) if task.hopeless else None
    stage = simulation.stage(simulation.scenario.stages[0], watch)
    seen = [r for r in stage.records if r.number > skipped]
    done = [_of_twin(requests[record.number - 1], record, source.slo) for record in seen]
    result = _result(done)
    if watch is not None and watch.over:
        return msgspec.structs.replace(result, broken_off=True)
    return result


def merged(results: Sequence[Result]) -> Result:
    """The mean over seeds."""
    if len(results) == 1:
        return results[0]
    first = results[0]
    shares = [r.within_slo for r in results if r.within_slo is not None]
    counts: Counter[str] = Counter()
    for result in results:
        counts.update(result.requests_by_endpoint)
    return Result(
        requests=first.requests,
        ok=round(fmean(r.ok for r in results)),
        output_tok_s=fmean(r.output_tok_s for r in results),
        ttft=_mean([r.ttft for r in results if r.ttft]),
        tpot=_mean([r.tpot for r in results if r.tpot]),
        within_slo=fmean(shares) if shares else None,
        requests_by_endpoint={name: round(n / len(results)) for name, n in counts.items()},
        in_flight_by_endpoint={
            name: fmean(r.in_flight_by_endpoint.get(name, 0.0) for r in results) for name in counts
        },
    )


def keeps(result: Result, share: float) -> bool:
    """Whether so many requests kept their limits."""
    return not result.broken_off and result.within_slo is not None and result.within_slo >= share


def _mean(times: Sequence[Percentiles]) -> Percentiles | None:
    if not times:
        return None
    return Percentiles(
        count=times[0].count,
        mean=fmean(t.mean for t in times),
        p50=fmean(t.p50 for t in times),
        p90=fmean(t.p90 for t in times),
        p99=fmean(t.p99 for t in times),
        max=max(t.max for t in times),
    )


def _scenario(task: Task, recording: Recording) -> Scenario:
    source, header = task.source, recording.header
    return Scenario(
        engines=task.fleet.items,
        workload=Trace(source.path, faster=source.scale, last=source.last),
        stages=(Load(),),
        warm_up_stages=0,
        metrics_interval_s=header.metrics_interval_s,
        prefix_block_tokens=header.prefix_block_tokens,
    )


def _counted(recording: Recording) -> Sequence[Traced]:
    from_s = recording.requests[0].at_s + warm_up_s(recording)
    return [request for request in recording.requests if request.at_s >= from_s]


def _slo(request: Traced, slo: Slo) -> Slo:
    """The request's own limits, else the given ones."""
    ttft_ms, tpot_ms = request.slo_ttft_ms, request.slo_tpot_ms
    return Slo(
        slo.ttft_s if ttft_ms is None else ttft_ms / 1000, slo.tpot_s if tpot_ms is None else tpot_ms / 1000
    )


def _of_trace(recording: Recording, request: Traced, slo: Slo) -> Done:
    output = recording.output_tokens(request)
    ttft_s = request.ttft_s if request.stream else None
    tpot_s = None
    if ttft_s is not None and output > 1:
        tpot_s = (request.duration_s - ttft_s) / (output - 1)
    ok = request.ending == Ending.OK.value
    end_s = request.at_s + request.duration_s
    return Done(request.at_s, end_s, request.endpoint, ttft_s, tpot_s, output, ok, _slo(request, slo))


def _of_twin(request: Traced, record: Served, slo: Slo) -> Done:
    """``request`` is what ``record`` replayed: what could not be seen of it is not looked at here."""
    ok = not record.error
    return Done(
        record.sent_s,
        record.end_s,
        record.endpoint,
        record.first_s - record.sent_s if ok and request.stream else None,
        tpot_s(record) if ok and request.stream else None,
        record.usage.output_tokens or 0,
        ok,
        _slo(request, slo),
    )


def _result(done: Sequence[Done]) -> Result:
    well = [d for d in done if d.ok]
    held_s: defaultdict[str, float] = defaultdict(float)
    for d in done:
        held_s[d.endpoint] += d.end_s - d.at_s
    span_s = max((d.end_s for d in well), default=0.0) - min((d.at_s for d in done), default=0.0)
    return Result(
        requests=len(done),
        ok=len(well),
        output_tok_s=sum(d.output_tokens for d in well) / span_s if span_s > 0 else 0.0,
        ttft=percentiles((d.ttft_s for d in well if d.ttft_s is not None), mergeable=False),
        tpot=percentiles((d.tpot_s for d in well if d.tpot_s is not None), mergeable=False),
        within_slo=_within(done),
        requests_by_endpoint=dict(sorted(Counter(d.endpoint for d in done).items())),
        in_flight_by_endpoint={name: s / span_s if span_s > 0 else 0.0 for name, s in sorted(held_s.items())},
    )


def _within(done: Iterable[Done]) -> float | None:
    judged = [d for d in done if d.slo != NO_SLO]
    return sum(map(is_good, judged)) / len(judged) if judged else None


def is_good(done: Done) -> bool:
    """It was answered, within its limits as far as can be seen."""
    limits = ((done.ttft_s, done.slo.ttft_s), (done.tpot_s, done.slo.tpot_s))
    return done.ok and all(value is None or limit is None or value <= limit for value, limit in limits)


class _Hopeless:
    """Breaks a replay off when too many requests have missed their limits (``run.Hopeless``)."""

    def __init__(self, requests: Sequence[Traced], skipped: int, slo: Slo) -> None:
        self._requests = requests
        self._skipped = skipped
        self._slo = slo
        self._seen = 0
        self._missed = 0
        judged = [r for r in requests[skipped:] if _slo(r, slo) != NO_SLO]
        self._most = (1 - SHARE_WITHIN_SLO) * len(judged)
        self.over = False

    def __call__(self, ended: Sequence[Served], under_way: Sequence[Served], now_s: float) -> bool:
        for record in ended[self._seen :]:
            if record.number > self._skipped:
                request = self._requests[record.number - 1]
                done = _of_twin(request, record, self._slo)
                self._missed += done.slo != NO_SLO and not is_good(done)
        self._seen = len(ended)
        late = sum(self._is_late(record, now_s) for record in under_way)
        self.over = self._missed + late > self._most
        return self.over

    def _is_late(self, record: Served, now_s: float) -> bool:
        """It has waited for its first token for longer than it may."""
        if record.number <= self._skipped or record.first_s:
            return False
        request = self._requests[record.number - 1]
        limit_s = _slo(request, self._slo).ttft_s
        return request.stream and limit_s is not None and now_s - record.sent_s > limit_s
