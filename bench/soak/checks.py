"""What must hold when the load is paused, and at the end."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .gateway import INDEX_BYTES, View
from .load import Tally
from .verdict import Verdict

FLAT_SHARE, FLAT_BYTES = 0.05, 10e6
"""Growth of the router's memory after the warm-up that counts as none."""
JUDGED_S = 60.0
"""Memory is judged when at least so much of the run comes after the warm-up."""
MAX_UNLUCKY_SHARE = 0.005
"""Of the requests; more means that retries do not avoid bad engines."""
WARM_SAMPLES = 10


@dataclass(frozen=True)
class Check:
    name: str
    ok: bool
    detail: str


def when_quiet(view: View, states: Mapping[str, Mapping[str, Any]], tally: Tally) -> list[Check]:
    """With no request under way and every engine well."""
    listed = {name: sum(e["in_flight"].values()) for name, e in view.listed.items()}
    busy = {a: s for a, s in states.items() if s["running"] or s["waiting"] or s["held"]}
    told = {a: [s["running"], s["waiting"], s["held"]] for a, s in busy.items()}
    return [
        Check("in-flight gauges are zero", not any(view.in_flight.values()), f"{view.in_flight}"),
        Check("/endpoints agrees", not any(listed.values()) and bool(listed), f"{listed}"),
        Check("engines run nothing", not busy, f"running, waiting, held: {told}"),
        Check("every request was counted once", *_counted(view, tally)),
        Check(
            "prefix index is below its bound",
            0 < view.index_bytes <= INDEX_BYTES,
            f"{view.index_bytes:.0f} of {INDEX_BYTES} bytes",
        ),
    ]


def _counted(view: View, tally: Tally) -> tuple[bool, str]:
    """Sums agree, and each ending's count lies between ours and ours with all that left."""
    ours, theirs = tally.endings, view.endings
    total = sum(theirs.values())
    left = ours[""]
    wrong = {
        name: f"{theirs[name]}, not {ours[name]} to {ours[name] + left}"
        for name in {*ours, *theirs} - {"", "cancelled"}
        if not ours[name] <= theirs[name] <= ours[name] + left
    }
    if theirs["cancelled"] > left:
        wrong["cancelled"] = f"{theirs['cancelled']}, not up to {left}"
    return total == tally.sent and not wrong, f"sent {tally.sent}, counted {total} {wrong or ''}".rstrip()


def recovered(view: View) -> Check:
    """Some time after all engines are well."""
    away = {
        name: f"{e['breaker']}, reached: {e['reached']}"
        for name, e in view.listed.items()
        if e["breaker"] != "closed" or not e["reached"]
    }
    return Check("every engine is trusted again", not away and bool(view.listed), f"{away or 'all'}")


def answered(tally: Tally) -> list[Check]:
    """No request was lost; those that met bad engines only are rare."""
    total = sum(tally.verdicts.values())
    share = tally.verdicts[Verdict.UNLUCKY] / max(1, total)
    bad = {v.value: n for v, n in tally.verdicts.items() if not v.fine}
    good = tally.verdicts[Verdict.OK]
    return [
        Check("no request was lost or wrong", not bad and good > 0, f"{bad or 'none'} of {total}"),
        Check("bad engines in every try are rare", share <= MAX_UNLUCKY_SHARE, f"{share:.3%} of requests"),
    ]


def flat(curve: Sequence[tuple[float, int]], warm_up_s: float) -> Check:
    """``curve``: seconds since the start and the router's memory in bytes."""
    name = "memory is flat"
    warm = [rss for at_s, rss in curve if at_s >= warm_up_s]
    if not warm or curve[-1][0] - warm_up_s < JUDGED_S:
        return Check(name, True, "not judged: the run is too short")
    before, after = _middle(warm[:WARM_SAMPLES]), _middle(warm[-WARM_SAMPLES:])
    allowed = before * (1 + FLAT_SHARE) + FLAT_BYTES
    detail = f"{before / 1e6:.1f} MB after the warm-up, {after / 1e6:.1f} MB at the end"
    return Check(name, after <= allowed, detail)


def _middle(values: Sequence[int]) -> int:
    return sorted(values)[len(values) // 2]


def files(baseline: int, now: int, engines: int) -> Check:
    """Scraping may keep a connection to each engine; requests must have left none."""
    return Check("open files are back", now <= baseline + engines, f"{baseline} before, {now} after")


def no_complaints(lines: Sequence[str]) -> Check:
    return Check("the router logged no error of its own", not lines, "; ".join(lines[:3]) or "none")
