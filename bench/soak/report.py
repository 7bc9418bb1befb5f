"""A soak in a table and in JSON."""

from collections.abc import Iterator
from typing import Any

import msgspec

from .run import Pause, Result
from .verdict import Verdict

CURVE_POINTS = 24
DETAIL_CHARACTERS = 100
"""Longer details are for the terminal."""
_COLUMNS = (
    "time",
    "sent",
    "answered",
    "left",
    "cut",
    "500s",
    "unlucky",
    "wrong",
    "RSS MB",
    "files",
    "index KB",
)


def row(result: Result, pause: Pause) -> list[str]:
    """A round's end as cells; counts are from the start on."""
    of = pause.verdicts.get
    wrong = sum(of(v.name.lower(), 0) for v in Verdict if not v.fine)
    counts = [of(name, 0) for name in ("ok", "left", "cut", "passed_on", "unlucky")]
    cells = [sum(pause.verdicts.values()), *counts, wrong]
    return [
        f"{pause.at_s:.0f} s",
        *map(str, cells),
        f"{pause.rss_bytes / 1e6:.1f}",
        str(pause.open_files),
        f"{pause.index_bytes / 1024:.0f}",
    ]


def line(result: Result, pause: Pause) -> str:
    """The same for the terminal, with a heading before the first."""
    text = " ".join(f"{cell:>8}" for cell in row(result, pause))
    if len(result.pauses) == 1:
        text = " ".join(f"{name:>8}" for name in _COLUMNS) + "\n" + text
    return "\n".join([text, *(f"         NOT: {c.name}: {c.detail}" for c in pause.failed)])


def markdown(result: Result) -> str:
    return "\n".join(_markdown(result)) + "\n"


def _markdown(result: Result) -> Iterator[str]:
    plan, tally = result.plan, result.tally
    yield f"{plan.seconds:.0f} s, {plan.engines} engines, {plan.rate:g} requests/s, seed {plan.seed}."
    yield ""
    yield "| check | | |\n|---|---|---|"
    for check in result.final:
        detail = check.detail if len(check.detail) < DETAIL_CHARACTERS else ""
        yield f"| {check.name} | {_holds(check.ok)} | {detail} |"
    bad = [(p, c) for p in result.pauses for c in p.failed]
    yield f"| all of it quiet in each of {len(result.pauses)} pauses | {_holds(not bad)} | |"
    yield ""
    yield "| request was | count |\n|---|---|"
    for verdict in Verdict:
        yield f"| {verdict.value} | {tally.verdicts[verdict]:,} |"
    yield ""
    faults = ", ".join(f"{n} {kind}" for kind, n in sorted(result.faults.items()))
    yield f"Faults: {faults}."
    yield f"Moved to another engine: {result.retries:,} times."
    cores = ", ".join(f"{name} {share:.2f} cores" for name, share in cores_of(result).items())
    late = ", ".join(f"{name} {lag_s:.2f} s" for name, lag_s in result.lags_s.items())
    yield f"CPU: {cores}. Event loops late by at most: {late}."
    yield ""
    yield "| " + " | ".join(_COLUMNS) + " |\n|" + "---|" * len(_COLUMNS)
    for pause in result.pauses:
        yield "| " + " | ".join(row(result, pause)) + " |"


def _holds(ok: bool) -> str:
    return "yes" if ok else "**NO**"


def cores_of(result: Result) -> dict[str, float]:
    """CPU seconds a second of each process, over the run."""
    if len(result.samples) < 2:
        return {}
    first, last = result.samples[0], result.samples[-1]
    took_s = last.at_s - first.at_s
    return {name: (last.cpu_s[name] - first.cpu_s[name]) / took_s for name in first.cpu_s}


def curve(result: Result) -> str:
    """The router's memory over time, in a few lines."""
    every = max(1, len(result.samples) // CURVE_POINTS)
    points = result.samples[::every]
    top = max(s.rss_bytes for s in points)
    return "\n".join(
        f"{s.at_s:6.0f} s {s.rss_bytes / 1e6:7.1f} MB {'#' * round(50 * s.rss_bytes / top)}" for s in points
    )


def to_json(result: Result) -> bytes:
    """Everything, for whoever wants to look closer."""

    def plain(value: Any) -> Any:
        return {v.name.lower(): n for v, n in value.items()} if value is result.tally.verdicts else value

    tree = {
        "plan": result.plan,
        "passed": not result.failed,
        "checks": result.final,
        "verdicts": plain(result.tally.verdicts),
        "kinds": result.tally.by_kind,
        "endings": result.tally.endings,
        "stories": result.tally.stories,
        "pauses": result.pauses,
        "faults": result.faults,
        "retries": result.retries,
        "lags_s": result.lags_s,
        "cores": cores_of(result),
        "samples": result.samples,
    }
    return msgspec.json.format(msgspec.json.encode(tree), indent=1)
