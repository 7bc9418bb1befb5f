"""What a stage of requests amounts to. All times are engine seconds, see ``bench.pace``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial

import msgspec

from pointsman.bench.client import Record
from pointsman.bench.histogram import Percentiles, percentiles
from pointsman.bench.stream import Gaps

_DETAIL_CHARS = 200
_LEAST_WINDOW = 0.02
"""Of the whole stage: a burst that is sent at once has no time under load worth the name."""


class Slo(msgspec.Struct, frozen=True):
    """Limits a request must keep to count as good [s]; None: no limit."""

    ttft_s: float | None = None
    tpot_s: float | None = None


NO_SLO = Slo()


class Bill(msgspec.Struct, frozen=True):
    """What the endpoints together cost and draw while they are there; 0.0 where that is not known."""

    price_per_hour: float = 0.0
    """In any currency."""
    watts: float = 0.0

    def tokens_per_unit(self, tokens: float, seconds: float) -> float | None:
        """Tokens for one unit of the currency; None where no price is known."""
        spent = self.price_per_hour * seconds / 3600
        return tokens / spent if spent else None

    def tokens_per_kwh(self, tokens: float, seconds: float) -> float | None:
        """Tokens for one kilowatt-hour; None where no draw is known."""
        kwh = self.watts * seconds / 3.6e6
        return tokens / kwh if kwh else None


NO_BILL = Bill()


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of one stage. None where nothing told."""

    load: str
    """What was asked for: ``rate 85`` or ``concurrency 64``."""
    rate: float | None
    """Requests a second asked for; None in a closed loop."""
    requests: int
    ok: int
    errors: Mapping[str, int]
    """Requests by kind of failure."""
    error_details: Mapping[str, str]
    """The first message of each kind."""
    send_s: float
    """From the first request sent to the last one."""
    makespan_s: float
    """From the first request sent to the end of the last successful one: the drain is in it."""
    achieved_rate: float
    requests_s: float
    """Successful requests a second of makespan."""
    output_tokens: int
    output_tok_s: float
    """Output tokens of successful requests by makespan: the slowest endpoint's drain sets it."""
    steady_output_tok_s: float | None
    """Output tokens a second while load was on, see ``steady_tok_s``."""
    prompt_tokens: int | None
    cached_tokens: int | None
    prefix_hit_rate: float | None
    """Cached share of the prompt tokens, where usage says."""
    ttft: Percentiles | None
    """To the first token from when the request was due: includes waiting in this client."""
    ttft_sent: Percentiles | None
    """The same from when it was sent; what hides a stalled server in other clients."""
    tpot: Percentiles | None
    """Mean time per output token after the first, one value a request."""
    itl: Percentiles | None
    """Each gap between token events."""
    e2e: Percentiles | None
    """From due to the last byte."""
    late: Percentiles | None
    """How long after being due requests were sent: this client's own doing."""
    within_slo: float | None
    """Share of all requests, failed ones included, that kept the SLO."""
    goodput: float | None
    """Requests within the SLO a second of makespan."""
    tokens_per_unit: float | None
    """Output tokens of successful requests for each currency unit that the makespan costs."""
    tokens_per_kwh: float | None
    """The same for each kilowatt-hour drawn."""
    endpoints: Mapping[str, int]
    """Requests by endpoint, where the response says."""


def tpot_s(record: Record) -> float | None:
    """Mean seconds per output token after the first. Engines that put several tokens into an event send the
    first token alone.
    """
    tokens = record.usage.output_tokens or record.events
    if record.events < 2 or tokens < 2:
        return None
    return (record.last_s - record.first_s) / (tokens - 1)


def steady_tok_s(records: Sequence[Record]) -> float | None:
    """Output tokens a second from a quarter into the sending until the last request was sent: what the pool
    gives under load, without filling up and draining. Tokens of a request are spread evenly over its
    stream.
    """
    first_sent, last_sent = min(r.sent_s for r in records), max(r.sent_s for r in records)
    start, end = first_sent + (last_sent - first_sent) / 4, last_sent
    stage_s = max(r.end_s for r in records) - first_sent
    if end - start <= max(0.0, _LEAST_WINDOW * stage_s):
        return None
    tokens = 0.0
    for r in records:
        count = r.usage.output_tokens or r.events
        span = r.last_s - r.first_s
        if span > 0:
            tokens += count * max(0.0, min(end, r.last_s) - max(start, r.first_s)) / span
        elif r.events and start <= r.first_s < end:
            tokens += count
    return tokens / (end - start)


def is_good(record: Record, slo: Slo) -> bool:
    """The request succeeded within the limits."""
    if record.error:
        return False
    if slo.ttft_s is not None and record.first_s - record.due_s > slo.ttft_s:
        return False
    tpot = tpot_s(record)
    return slo.tpot_s is None or tpot is None or tpot <= slo.tpot_s


def summarise(
    load: str,
    records: Sequence[Record],
    gaps: Gaps,
    slo: Slo = NO_SLO,
    *,
    bill: Bill = NO_BILL,
    rate: float | None = None,
    mergeable: bool = True,
) -> Stage:
    """The figures of one stage; ``records`` must not be empty. ``mergeable`` ones bring the histograms of
    their times.
    """
    ok = [r for r in records if not r.error]
    errors = Counter(r.error for r in records if r.error)
    first_s, last_sent_s = min(r.sent_s for r in records), max(r.sent_s for r in records)
    makespan_s = max((r.end_s for r in ok), default=max(r.end_s for r in records)) - first_s
    send_s = last_sent_s - first_s
    output_tokens = sum(r.usage.output_tokens or r.events for r in ok)
    counted = [r.usage for r in ok if r.usage.prompt_tokens]
    told = [u for u in counted if u.cached_tokens is not None]
    cached = sum(u.cached_tokens or 0 for u in told)
    looked_up = sum(u.prompt_tokens or 0 for u in told)
    good = sum(is_good(r, slo) for r in records) if slo != NO_SLO else None
    spread = partial(percentiles, mergeable=mergeable)
    return Stage(
        load=load,
        rate=rate,
        requests=len(records),
        ok=len(ok),
        errors=dict(errors.most_common()),
        error_details={r.error: r.detail.strip()[:_DETAIL_CHARS] for r in reversed(records) if r.error},
        send_s=send_s,
        makespan_s=makespan_s,
        achieved_rate=_per_s(len(records) - 1, send_s),
        requests_s=_per_s(len(ok), makespan_s),
        output_tokens=output_tokens,
        output_tok_s=_per_s(output_tokens, makespan_s),
        steady_output_tok_s=steady_tok_s(records),
        prompt_tokens=sum(u.prompt_tokens or 0 for u in counted) if counted else None,
        cached_tokens=cached if told else None,
        prefix_hit_rate=cached / looked_up if looked_up else None,
        ttft=spread(r.first_s - r.due_s for r in ok),
        ttft_sent=spread(r.first_s - r.sent_s for r in ok),
        tpot=spread(t for r in ok if (t := tpot_s(r)) is not None),
        itl=spread((), gaps.counts),
        e2e=spread(r.end_s - r.due_s for r in ok),
        late=spread(r.sent_s - r.due_s for r in records),
        within_slo=None if good is None else good / len(records),
        goodput=None if good is None else _per_s(good, makespan_s),
        tokens_per_unit=bill.tokens_per_unit(output_tokens, makespan_s),
        tokens_per_kwh=bill.tokens_per_kwh(output_tokens, makespan_s),
        endpoints=dict(sorted(Counter(r.endpoint for r in records if r.endpoint).items())),
    )


def _per_s(count: float, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
