"""Plain-text tables and bars for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pointsman.bench.histogram import Percentiles
from pointsman.bench.report import Stage


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows as aligned columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def bars(rows: Sequence[tuple[str, float, str]], width: int = 50) -> str:
    """One bar a row (label, value, what to write behind it); the largest value is ``width`` long."""
    largest = max(value for _, value, _ in rows) or 1.0
    left = max(len(label) for label, _, _ in rows)
    return "\n".join(
        f"{label.ljust(left)}  {'█' * max(1, round(width * value / largest)) if value else ''} {text}"
        for label, value, text in rows
    )


def seconds(value: float | None) -> str:
    """A duration at three digits: ``850 ms``, ``12.3 s``."""
    if value is None:
        return "-"
    if value < 1:
        return f"{value * 1000:.3g} ms"
    return f"{value:.3g} s" if value < 1000 else f"{value:.0f} s"


def share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def count(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _at(field: str, point: str) -> Callable[[Stage], str]:
    def cell(stage: Stage) -> str:
        found: Percentiles | None = getattr(stage, field)
        return "-" if found is None else seconds(getattr(found, point))

    return cell


_COLUMNS: tuple[tuple[str, Callable[[Stage], str]], ...] = (
    ("", lambda s: s.load),
    ("requests", lambda s: count(s.requests)),
    ("failed", lambda s: count(s.requests - s.ok)),
    ("req/s", lambda s: count(s.requests_s)),
    ("out tok/s", lambda s: count(s.output_tok_s)),
    ("under load", lambda s: count(s.steady_output_tok_s)),
    ("TTFT p50", _at("ttft", "p50")),
    ("p90", _at("ttft", "p90")),
    ("p99", _at("ttft", "p99")),
    ("TPOT p50", _at("tpot", "p50")),
    ("p99", _at("tpot", "p99")),
    ("e2e p50", _at("e2e", "p50")),
    ("p99", _at("e2e", "p99")),
    ("prefix hits", lambda s: share(s.prefix_hit_rate)),
)


def stages_table(stages: Sequence[Stage]) -> str:
    """The main figures, a line a stage."""
    shown = list(_COLUMNS)
    if any(stage.goodput is not None for stage in stages):
        shown += [("within SLO", lambda s: share(s.within_slo)), ("goodput", lambda s: count(s.goodput))]
    if any(stage.tokens_per_unit is not None for stage in stages):
        shown.append(("tok/unit", lambda s: count(s.tokens_per_unit)))
    if any(stage.tokens_per_kwh is not None for stage in stages):
        shown.append(("tok/kWh", lambda s: count(s.tokens_per_kwh)))
    return columns([[title for title, _ in shown], *([cell(s) for _, cell in shown] for s in stages)])


def remarks(stages: Sequence[Stage]) -> list[str]:
    """What the table has no room for: failures by kind, and who answered."""
    lines = []
    for stage in stages:
        for kind, times in stage.errors.items():
            detail = stage.error_details.get(kind, "")
            lines.append(f"{stage.load}: {times} x {kind}{': ' if detail else ''}{detail}")
        if stage.endpoints:
            shares = ", ".join(f"{name} {n / stage.requests:.1%}" for name, n in stage.endpoints.items())
            lines.append(f"{stage.load}: answered by {shares}")
    return lines
