"""What ``calibrate`` found, as plain-text tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pointsman.bench.table import columns
from pointsman.sim.profiles import EngineParameters
from pointsman.twin.calibrate import TOLERANCE, Fit, Range, Trade
from pointsman.twin.probe import Probed

_SHOWN: Mapping[str, tuple[str, float]] = {
    "base_s": ("ms a step", 1e3),
    "sequence_s": ("us a sequence", 1e6),
    "context_token_s": ("ns a context token", 1e9),
    "prefill_tokens_per_s": ("prefill tok/s", 1.0),
    "prefill_step_s": ("ms a step with prefill", 1e3),
    "kv_tokens": ("KV tokens", 1.0),
}


def fitted(fit: Fit, known: Sequence[Range], traded: Sequence[Trade]) -> str:
    """One kind of server: its constants, how well each is known, and which of them trade off."""
    unseen_before, unseen = fit.other_seed_error
    parts = [
        f"{fit.accelerator} {fit.model}: {fit.stages} stages, {fit.evaluations} evaluations; "
        f"error {fit.start_error:.3f} > {fit.error:.3f}, "
        f"with a seed it has not seen {unseen_before:.3f} > {unseen:.3f}",
        _constants(fit.start, fit.found, {r.field: r for r in known}),
    ]
    if traded:
        parts.append(_trades(traded))
    return "\n".join(parts)


def probed(found: Probed) -> str:
    """A live server's constants with their standard errors."""
    head = ("constant", "", "found", "standard error")
    lines = [
        (c.field, _SHOWN[c.field][0], _value(c.field, c.value), f"±{_value(c.field, c.error)}")
        for c in found.constants
    ]
    return columns([head, *lines])


def _constants(start: EngineParameters, found: EngineParameters, known: Mapping[str, Range]) -> str:
    head = ["constant", "", "start", "found"]
    if known:
        head.append(f"error grows by {TOLERANCE:g} at")
    lines = []
    for field, (unit, _) in _SHOWN.items():
        cells = [field, unit, _value(field, getattr(start, field)), _value(field, getattr(found, field))]
        if field in known:
            cells.append(f"{_limit(known[field].down, '÷')} {_limit(known[field].up, 'x')}")
        elif known:
            cells.append("given")
        lines.append(cells)
    return columns([head, *lines])


def _trades(traded: Sequence[Trade]) -> str:
    head = ("moved", "", "error grows by", "other", "follows", "then only by")
    lines = [
        (t.field, f"x{t.by:g}", f"{t.growth:+.3f}", t.other, f"x{t.other_by:g}", f"{t.growth_made_up:+.3f}")
        for t in traded
    ]
    return columns([head, *lines])


def _limit(factor: float | None, sign: str) -> str:
    return f"{sign}>3" if factor is None else f"{sign}{factor:.2f}"


def _value(field: str, value: float) -> str:
    scaled = value * _SHOWN[field][1]
    return f"{scaled:,.0f}" if scaled >= 1000 else f"{scaled:.3g}"
