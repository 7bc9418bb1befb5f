"""The case study's results as plain-text tables."""

from __future__ import annotations

from collections.abc import Sequence

from pointsman.bench.table import columns, count, seconds, share
from pointsman.twin.casestudy import Summary
from pointsman.twin.fidelity import Factors, FidelityRow
from pointsman.twin.scaling import ScalingRow
from pointsman.twin.seeds import Mean, mean_of


def comparison(rows: Sequence[Summary]) -> str:
    """A table a pool: a block a rate, a line a policy."""
    pools: dict[tuple[str, str], list[Summary]] = {}
    for row in rows:
        pools.setdefault((row.pool, row.model), []).append(row)
    return "\n\n".join(f"{' '.join(pool)}\n{_pool(group)}" for pool, group in pools.items())


def fidelity(rows: Sequence[FidelityRow]) -> str:
    """A line a stage; ``answered`` is what the load generator's count comes to without its mistake."""
    head = (
        "experiment", "run", "router", "stage", "rate",
        "tok/s", "answered", "twin", "x", "x answered",
        "TPOT", "twin", "x", "TTFT", "twin", "x", "failed", "twin", "",
    )  # fmt: skip
    lines = [
        (
            row.experiment,
            row.run_id[-6:],
            row.router,
            str(row.stage),
            f"{row.rate:g}",
            count(row.measured_output_tok_s),
            count(row.measured_answered_tok_s),
            count(row.output_tok_s),
            _ratio(row.output_tok_s, row.measured_output_tok_s),
            _ratio(row.output_tok_s, row.measured_answered_tok_s),
            seconds(row.measured_tpot_mean_s),
            seconds(row.tpot_mean_s),
            _ratio(row.tpot_mean_s, row.measured_tpot_mean_s),
            seconds(row.measured_ttft_mean_s),
            seconds(row.ttft_mean_s),
            _ratio(row.ttft_mean_s, row.measured_ttft_mean_s),
            str(row.measured_failed),
            f"{row.failed:.0f}",
            row.failure,
        )
        for row in rows
    ]
    return columns([head, *lines])


def factors(rows: Sequence[Factors]) -> str:
    """Typical factors between twin and measurement, a line a group of stages."""
    head = ("typical factor", "stages", "tok/s", "answered tok/s", "TPOT", "TTFT")
    lines = [
        (
            row.group,
            str(row.stages),
            *(f"{x:.3f}" for x in (row.output_tok_s, row.answered_tok_s, row.tpot_mean_s, row.ttft_mean_s)),
        )
        for row in rows
    ]
    return columns([head, *lines])


def scaling(rows: Sequence[ScalingRow], against: str) -> str:
    """A line a pool: each policy's tokens a second as a multiple of ``against``'s with the same seed."""
    pools: dict[tuple[int, int, int, float], dict[str, list[ScalingRow]]] = {}
    for row in rows:
        key = (row.kinds, row.endpoints, row.groups, row.rate)
        pools.setdefault(key, {}).setdefault(row.policy, []).append(row)
    others = [name for name in dict.fromkeys(row.policy for row in rows) if name != against]
    head = ["kinds", "endpoints", "groups", "rate", f"{against} tok/s", "of bound"]
    for name in others:
        head += [f"{name} x", "of bound"]
    lines = []
    for (kinds, endpoints, groups, rate), found in pools.items():
        base = found[against]
        cells = [str(kinds), str(endpoints), str(groups), f"{rate:.0f}", *_tok_s(base)]
        for name in others:
            pairs = zip(found[name], base, strict=True)
            ratios = mean_of([one.output_tok_s / other.output_tok_s for one, other in pairs])
            cells += [_within(ratios, 2), _tok_s(found[name])[1]]
        lines.append(cells)
    return columns([head, *lines])


def _pool(rows: Sequence[Summary]) -> str:
    head = (
        "rate", "policy", "tok/s", "of bound", "with KV", "x llm-d", "x k8s", "measured",
        "TTFT mean", "p50", "p99", "measured", "TPOT", "hits", "failed",
    )  # fmt: skip
    lines: list[tuple[str, ...]] = []
    for rate in sorted({row.rate for row in rows}):
        at_rate = [row for row in rows if row.rate == rate]
        first = at_rate[0]
        blank = ("",) * (len(head) - 3)
        lines.append((f"{rate:g}", "fluid bound", count(first.bound_tok_s), *blank))
        lines.append(("", "fluid bound with KV", count(first.bound_kv_tok_s), *blank))
        lines += [_line(row) for row in sorted(at_rate, key=lambda row: -row.output_tok_s.mean)]
    return columns([head, *lines])


def _line(row: Summary) -> tuple[str, ...]:
    return (
        "",
        row.policy,
        _within(row.output_tok_s, 0),
        share(row.of_bound),
        share(row.of_bound_kv),
        "-" if row.to_llm_d is None else f"{row.to_llm_d:.2f}",
        "-" if row.to_kubernetes is None else f"{row.to_kubernetes:.2f}",
        count(row.measured_output_tok_s),
        _seconds(row.ttft_mean_s),
        _seconds(row.ttft_p50_s),
        _seconds(row.ttft_p99_s),
        seconds(row.measured_ttft_mean_s),
        _seconds(row.tpot_mean_s),
        share(row.prefix_hit_rate),
        share(row.failed) if row.failed else "",
    )


def _tok_s(rows: Sequence[ScalingRow]) -> tuple[str, str]:
    found = mean_of([row.output_tok_s for row in rows])
    return f"{found.mean:,.0f}", share(found.mean / rows[0].bound_tok_s)


def _seconds(value: Mean | None) -> str:
    return seconds(None if value is None else value.mean)


def _within(value: Mean, digits: int) -> str:
    text = f"{value.mean:,.{digits}f}"
    return text if value.ci95 is None else f"{text} ±{value.ci95:,.{digits}f}"


def _ratio(one: float | None, other: float) -> str:
    return "-" if one is None else f"{one / other:.2f}"
