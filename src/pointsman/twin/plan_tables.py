"""A plan as text and as plain data: first how far the twin is off, then what it says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean
from textwrap import fill

import msgspec

from pointsman.bench.table import columns, count, seconds, share
from pointsman.bench.workloads.recorded import Recording
from pointsman.twin.plan import SHARE_WITHIN_SLO, Result, warm_up_s
from pointsman.twin.plan_cheapest import Found
from pointsman.twin.plan_fleet import Fleet

WIDTH = 110
MORE_AT_ONCE = 2.0
"""Times as many requests at once: beyond that a speed is extrapolated."""
SAME_S = 0.01
"""TTFTs that differ by less are the same to whoever waits."""

Figure = Callable[[Result], float | None]

_COMPARED: tuple[tuple[str, Figure, Callable[[float | None], str], float, float], ...] = (
    ("output tok/s", lambda r: r.output_tok_s, count, 0.10, 0.0),
    ("TTFT p50", lambda r: r.ttft.p50 if r.ttft else None, seconds, 0.30, SAME_S),
    ("TTFT p90", lambda r: r.ttft.p90 if r.ttft else None, seconds, 0.30, SAME_S),
    ("TTFT p99", lambda r: r.ttft.p99 if r.ttft else None, seconds, 0.50, SAME_S),
    ("TPOT p50", lambda r: r.tpot.p50 if r.tpot else None, seconds, 0.15, 0.0),
    ("TPOT p99", lambda r: r.tpot.p99 if r.tpot else None, seconds, 0.30, 0.0),
)
"""Figure, how it is read and written, and how far it may be off to be believed: as a share of what happened,
or in absolute terms. A fleet is not chosen by what differs less than this between two days.
"""


class Compared(msgspec.Struct, frozen=True):
    """A figure as it was, and as replays of the very same have it."""

    figure: str
    recorded: float | None
    replayed: float | None
    """The mean over seeds."""
    error: float | None
    """As a share of what was; None where there is nothing to compare."""
    between_seeds: float | None
    """Half of the way from the lowest replay to the highest, as such a share; None of a single one."""
    believable: bool


class Alternative(msgspec.Struct, frozen=True, kw_only=True):
    """A line of the table."""

    name: str
    policy: str
    fleet: Fleet
    result: Result
    price: float | None = None
    """Of an hour of the fleet; None where a price is not known."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All that a plan says."""

    recording: Recording
    happened: Result
    errors: Sequence[Compared]
    alternatives: Sequence[Alternative]
    """The first is the recorded fleet under the recorded load."""
    remarks: Sequence[str]
    found: Found | None = None
    """What ``--cheapest`` found; the last alternative if it is a fleet."""


def as_text(report: Report) -> str:
    """For people."""
    alternatives, found = report.alternatives, report.found
    parts = [
        trace_text(report.recording, alternatives[0].fleet, report.happened, report.remarks),
        error_text(report.errors),
        alternatives_text(alternatives),
        "\n".join(extrapolated(report.happened, alternatives)),
    ]
    if found:
        parts.append(cheapest_text(found))
    return "\n\n".join(filter(None, parts))


def as_json(report: Report) -> str:
    """For programs."""
    found = report.found
    tree: dict[str, object] = {
        "recorded": report.happened,
        "prediction_error": report.errors,
        "believable": all(each.believable for each in report.errors),
        "alternatives": [as_data(each) for each in report.alternatives],
        "extrapolated": extrapolated(report.happened, report.alternatives),
        "remarks": report.remarks,
        "refused": report.recording.refused,
    }
    if found:
        tree["cheapest"] = {
            "endpoints": found.fleet and dict(found.fleet.counts),
            "price_per_hour": found.price,
            "replays": found.replays,
            "mixes": found.mixes,
            "given_up": found.given_up,
        }
    return msgspec.json.format(msgspec.json.encode(tree)).decode()


def trace_text(recording: Recording, fleet: Fleet, happened: Result, remarks: Sequence[str]) -> str:
    """What was recorded, and what has to be said of it."""
    requests = recording.requests
    span_s = requests[-1].at_s - requests[0].at_s
    lines = [
        f"{len(requests):,} requests in {seconds(span_s)} to {len(fleet.items)} endpoints ({fleet.told}); "
        f"the first {seconds(warm_up_s(recording))} are sent but not counted"
    ]
    if recording.refused:
        lines.append(f"not sent again: {recording.refused:,} that were refused or ended in an error at once")
    failed = happened.requests - happened.ok
    if failed:
        lines.append(f"sent again, though cancelled or broken off then: {failed:,}")
    return "\n".join([*lines, *remarks])


def extrapolated(happened: Result, alternatives: Sequence[Alternative]) -> Sequence[str]:
    """A sentence for each alternative and kind that would have many more requests at once than were recorded:
    how slow its steps get then, nobody has seen.
    """
    was = _in_flight(alternatives[0], happened)
    return [
        f"EXTRAPOLATED: {other.name}: {requests:.0f} requests at once on each {kind}, where {was[kind]:.2g} "
        f"were recorded"
        for other in alternatives[1:]
        for kind, requests in _in_flight(other, other.result).items()
        if kind in was and requests > max(1.0, MORE_AT_ONCE * was[kind])
    ]


def _in_flight(alternative: Alternative, result: Result) -> dict[str, float]:
    """Requests at once on each endpoint of a kind."""
    kinds = {item.name: item.accelerator for item in alternative.fleet.items}
    found = dict.fromkeys(alternative.fleet.counts, 0.0)
    for name, requests in result.in_flight_by_endpoint.items():
        if name in kinds:
            found[kinds[name]] += requests / alternative.fleet.counts[kinds[name]]
    return found


def cheapest_text(found: Found) -> str:
    """How the search ended, in a sentence or two."""
    looked = f"{found.replays} replays, {found.mixes:,} mixes"
    if found.fleet is None:
        return (
            f"Cheapest: none; even the largest mix does not keep the SLO ({looked}). Give more with --more."
        )
    price = f"{found.price:.2f} an hour: {found.fleet.told}"
    if found.given_up:
        return (
            f"Not found within {looked}; the largest mix keeps the SLO for {price}. Give fewer with --more."
        )
    return f"Cheapest that keeps the SLO for {SHARE_WITHIN_SLO:.0%} of the requests: {price} ({looked})."


def compared(recorded: Result, replays: Sequence[Result]) -> list[Compared]:
    """Figure by figure. What happened may be one more throw of the dice: where it lies among the replays
    there is nothing to disbelieve.
    """
    found = []
    for name, figure, _, most, least in _COMPARED:
        was, seen = figure(recorded), [value for r in replays if (value := figure(r)) is not None]
        if not was or not seen:
            found.append(Compared(name, was, seen[0] if seen else None, None, None, True))
            continue
        mean = fmean(seen)
        error = mean / was - 1
        near = abs(error) <= most or abs(mean - was) <= least or min(seen) <= was <= max(seen)
        spread = (max(seen) - min(seen)) / 2 / was if len(seen) > 1 else None
        found.append(Compared(name, was, mean, error, spread, near))
    return found


def error_text(found: Sequence[Compared]) -> str:
    """The table of errors and what to think of them."""
    forms = {name: form for name, _, form, _, _ in _COMPARED}
    rows = [
        ["", *(c.figure for c in found)],
        ["as it happened", *(forms[c.figure](c.recorded) for c in found)],
        ["the same in the twin", *(forms[c.figure](c.replayed) for c in found)],
        ["error", *("-" if c.error is None else f"{c.error:+.1%}" for c in found)],
    ]
    if any(c.between_seeds is not None for c in found):
        spreads = ("-" if c.between_seeds is None else f"± {c.between_seeds:.1%}" for c in found)
        rows.append(["between its seeds", *spreads])
    wrong = [c.figure for c in found if not c.believable]
    verdict = "The twin is near enough to what happened to compare fleets by it."
    if wrong:
        verdict = (
            f"DO NOT BELIEVE what follows of {', '.join(wrong)}: the twin is too far from what happened. "
            "Compare lines with each other at most."
        )
    return f"{columns(rows)}\n\n{fill(verdict, WIDTH)}"


def alternatives_text(alternatives: Sequence[Alternative]) -> str:
    """A line each, those parts left out that no line has."""
    shown: list[tuple[str, Callable[[Alternative], str]]] = [
        ("", lambda a: a.name),
        ("policy", lambda a: a.policy),
        ("output tok/s", lambda a: count(a.result.output_tok_s)),
        ("TTFT p50", lambda a: seconds(a.result.ttft.p50 if a.result.ttft else None)),
        ("p99", lambda a: seconds(a.result.ttft.p99 if a.result.ttft else None)),
        ("TPOT p50", lambda a: seconds(a.result.tpot.p50 if a.result.tpot else None)),
        ("p99", lambda a: seconds(a.result.tpot.p99 if a.result.tpot else None)),
    ]
    if any(a.result.within_slo is not None for a in alternatives):
        shown.append(("within SLO", lambda a: share(a.result.within_slo)))
    if any(a.result.ok < a.result.requests for a in alternatives):
        shown.append(("failed", lambda a: count(a.result.requests - a.result.ok)))
    if any(a.price is not None for a in alternatives):
        shown.append(("price/h", lambda a: "-" if a.price is None else f"{a.price:.2f}"))
        shown.append(("tokens/unit", lambda a: count(_per_unit(a))))
    kinds = dict.fromkeys(kind for a in alternatives for kind in by_kind(a))
    shown += [(f"to {kind}", partial(_sent, kind)) for kind in kinds]
    rows = [[title for title, _ in shown], *([cell(a) for _, cell in shown] for a in alternatives)]
    return columns(rows)


def by_kind(alternative: Alternative) -> Mapping[str, int]:
    """Requests to each kind of endpoint."""
    kinds = {item.name: item.accelerator for item in alternative.fleet.items}
    found: Counter[str] = Counter(dict.fromkeys(alternative.fleet.counts, 0))
    for name, requests in alternative.result.requests_by_endpoint.items():
        if name in kinds:
            found[kinds[name]] += requests
    return found


def as_data(alternative: Alternative) -> dict[str, object]:
    """For ``--json``."""
    result: dict[str, object] = msgspec.to_builtins(alternative.result)
    return {
        "name": alternative.name,
        "policy": alternative.policy,
        "endpoints": dict(alternative.fleet.counts),
        "price_per_hour": alternative.price,
        "tokens_per_unit": _per_unit(alternative),
        "requests_by_kind": by_kind(alternative),
        **result,
    }


def _per_unit(alternative: Alternative) -> float | None:
    """Output tokens for one unit of the currency, at this load."""
    return alternative.result.output_tok_s * 3600 / alternative.price if alternative.price else None


def _sent(kind: str, alternative: Alternative) -> str:
    kinds = by_kind(alternative)
    return share(kinds[kind] / max(1, sum(kinds.values()))) if kind in kinds else "-"
