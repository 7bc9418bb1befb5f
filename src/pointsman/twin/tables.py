"""The comparison as tables for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean
from textwrap import fill

from pointsman.bench.report import Slo
from pointsman.bench.table import columns, count, seconds, share
from pointsman.twin.capacity import Held
from pointsman.twin.compare import Summary
from pointsman.twin.grid import OBJECTIVES, Ranking
from pointsman.twin.scenario import Scenario
from pointsman.twin.seeds import Mean, mean_of

WIDTH = 110

Cell = Callable[[Summary], str]


def _mean(name: str, form: Callable[[float | None], str]) -> Cell:
    def cell(summary: Summary) -> str:
        found = summary.figures.get(name)
        return form(found.mean if found else None)

    return cell


def _interval(name: str, form: Callable[[float | None], str]) -> Cell:
    def cell(summary: Summary) -> str:
        found = summary.figures.get(name)
        return with_interval(found, form) if found else "-"

    return cell


def with_interval(found: Mean, form: Callable[[float | None], str]) -> str:
    """``12,345 ± 678``, or the mean alone where one seed tells of no interval."""
    return form(found.mean) if found.ci95 is None else f"{form(found.mean)} ± {form(found.ci95)}"


def _failed(summary: Summary) -> str:
    figures = summary.figures
    return count(figures["requests"].mean - figures["ok"].mean)


_CLIENTS: tuple[tuple[str, Cell], ...] = (
    ("output tok/s", _interval("output_tok_s", count)),
    ("under load", _mean("steady_output_tok_s", count)),
    ("TTFT p50", _mean("ttft_p50_s", seconds)),
    ("p90", _mean("ttft_p90_s", seconds)),
    ("p99", _interval("ttft_p99_s", seconds)),
    ("TPOT p50", _mean("tpot_p50_s", seconds)),
    ("p99", _mean("tpot_p99_s", seconds)),
    ("e2e p50", _mean("e2e_p50_s", seconds)),
    ("within SLO", _mean("within_slo", share)),
    ("goodput", _interval("goodput", count)),
    ("failed", _failed),
)
_FLEET: tuple[tuple[str, Cell], ...] = (
    ("prefix hits", _mean("prefix_hit_rate", share)),
    ("pred. error", _mean("prediction_error_tokens", count)),
    ("copies", _mean("copies_per_prefix", count)),
    ("KV mean", _mean("kv_usage_mean", share)),
    ("max", _mean("kv_usage_max", share)),
    ("preempted", _mean("preemptions", count)),
)


_COSTS: tuple[tuple[str, str], ...] = (
    ("tok/unit", "tokens_per_unit"),
    ("at work", "working_tokens_per_unit"),
    ("tok/kWh", "tokens_per_kwh"),
    ("at work", "working_tokens_per_kwh"),
)
"""Columns that are there where the scenario has prices or watts."""


def fleet(scenario: Scenario) -> str:
    """``20 endpoints: 4 h100-nvl, 8 mi325x, 8 gaudi3``."""
    specs = scenario.specs()
    counts = Counter(spec.accelerator for spec in specs)
    kinds = ", ".join(f"{n} {name}" for name, n in counts.items())
    models = ", ".join(dict.fromkeys(spec.models[0] for spec in specs))
    return f"{len(specs)} endpoint{'s' if len(specs) > 1 else ''} ({kinds}; {models})"


def comparison(summaries: Sequence[Summary]) -> str:
    """For each stage what the clients saw and what the fleet did, a line a policy."""
    blocks = []
    for stage in dict.fromkeys(summary.stage for summary in summaries):
        policies = [summary for summary in summaries if summary.stage == stage]
        counts = sorted({f"{summary.figures['requests'].mean:,.0f}" for summary in policies})
        blocks.append(
            f"{policies[0].load}: {' or '.join(counts)} requests\n\n"
            f"{_table('what clients saw', _CLIENTS, policies)}\n\n"
            f"{_table('what the fleet did', (*_shares(policies[0]), *_FLEET), policies)}"
        )
        blocks += _costs(policies)
        blocks += _classes(policies)
        blocks += _errors(policies)
    return "\n\n".join(blocks)


def capacities(held: Sequence[Held]) -> str:
    """What each policy holds, a line a policy."""
    rows = [
        ["policy", "req/s held", "each seed: held-not held", "missed", "output tok/s", "TTFT p99", "TPOT p99"]
    ]
    for policy in dict.fromkeys(each.policy for each in held):
        seeds = [each for each in held if each.policy == policy]
        figures = [each.at_rate for each in seeds]
        missed = Counter(each.limit.upper() for each in seeds)
        rows.append(
            [
                policy,
                with_interval(mean_of([each.rate for each in seeds]), count),
                ", ".join(f"{each.rate:.3g}-{each.failed_rate:.3g}" for each in seeds),
                ", ".join(missed),
                count(fmean(f.output_tok_s for f in figures)),
                seconds(fmean(f.ttft.p99 for f in figures if f.ttft)),
                seconds(fmean(f.tpot.p99 for f in figures if f.tpot)),
            ]
        )
    return columns(rows)


def ranking(ranked: Ranking, most: int = 20) -> str:
    """The best points and the margin of the first."""
    name, _ = OBJECTIVES[ranked.objective]
    form = seconds if name.endswith("_p99_s") else count
    cells = list(ranked.points[0].values)
    rows = [["policy", *cells, "of the best"]]
    for point in ranked.points[:most]:
        values = [with_interval(point.values[cell], form) for cell in cells]
        rows.append([point.policy.name, *values, share(point.score.mean)])
    seeds = ranked.points[0].score.seeds
    parts = [
        f"{ranked.objective} of {len(ranked.points)} settings, {seeds} seeds, the best first",
        columns(rows),
        f"Best: --policy '{ranked.points[0].policy.name}'",
    ]
    for margin in ranked.margins:
        seen = f"{seeds} other seeds" if margin.fresh else "the same seeds"
        parts.append(f"Better than {margin.over.name} by {with_interval(margin.better, share)} ({seen})")
    return "\n\n".join(parts)


def slo_text(scenario: Scenario) -> str:
    """``TTFT p99 ≤ 2 s, TPOT p99 ≤ 100 ms``, of each class that has its own."""
    texts = [_limits(scenario.slo)]
    texts += [f"{name}: {_limits(slo)}" for name, slo in scenario.slos().items()]
    return "; ".join(texts)


def _limits(slo: Slo) -> str:
    limits = [
        f"{name} p99 ≤ {seconds(limit_s)}"
        for name, limit_s in (("TTFT", slo.ttft_s), ("TPOT", slo.tpot_s))
        if limit_s is not None
    ]
    return ", ".join(limits) or "no limits"


def legend(summaries: Sequence[Summary]) -> str:
    """What the words of the tables mean."""
    seeds = summaries[0].figures["requests"].seeds
    costs = (
        " tok/unit, tok/kWh: output tokens for a unit of the prices' currency and for a kilowatt-hour, all "
        "endpoints counted all the time; at work: each only while it had requests."
        if any(name in summaries[0].figures for _, name in _COSTS)
        else ""
    )
    means = f"Figures are means over {seeds} seeds; ± is the 95% confidence interval of that mean. "
    return fill(
        f"{means if seeds > 1 else ''}"
        "Times are virtual. output tok/s: by makespan, the drain included; under load: while requests were "
        "sent. goodput: requests/s within the SLO. prefix hits: share of the prompt tokens, by the engines' "
        "own count; pred. error: tokens by which the router's prediction of them was off, a request. copies: "
        f"endpoints that served a prefix. KV: share of the KV cache in use.{costs}",
        WIDTH,
    )


def _table(title: str, shown: Sequence[tuple[str, Cell]], summaries: Sequence[Summary]) -> str:
    head = [title, *(name for name, _ in shown)]
    return columns([head, *([s.policy, *(cell(s) for _, cell in shown)] for s in summaries)])


def _shares(summary: Summary) -> list[tuple[str, Cell]]:
    def cell(name: str) -> Cell:
        return lambda summary: share(summary.accelerators[name].request_share.mean)

    return [(f"to {name}", cell(name)) for name in summary.accelerators]


def _costs(summaries: Sequence[Summary]) -> list[str]:
    """A table of what tokens cost, where anything is known of that."""
    shown = [(title, _interval(name, count)) for title, name in _COSTS if name in summaries[0].figures]
    if not shown:
        return []
    names = summaries[0].accelerators
    return [_table("what it cost", (*shown, *((f"{n} at work", _working(n)) for n in names)), summaries)]


def _working(accelerator: str) -> Cell:
    return lambda summary: share(summary.accelerators[accelerator].working.mean)


def _classes(summaries: Sequence[Summary]) -> list[str]:
    """A table with a line a class and policy, where there are several classes."""
    names = list(dict.fromkeys(name for summary in summaries for name in summary.classes))
    if len(names) < 2:
        return []
    accelerators = list(summaries[0].accelerators)
    titles = ("requests", "within SLO", "goodput", "output tok/s", "TTFT p50", "p99", "TPOT p99")
    rows = [["by SLO class", "", *titles, *(f"to {name}" for name in accelerators)]]
    for name in names:
        for summary in summaries:
            found = summary.classes.get(name)
            if found is not None:
                times = (found.ttft_p50_s, found.ttft_p99_s, found.tpot_p99_s)
                rows.append(
                    [
                        summary.policy,
                        name or "none",
                        count(found.requests.mean),
                        with_interval(found.within_slo, share),
                        with_interval(found.goodput, count),
                        with_interval(found.output_tok_s, count),
                        *(seconds(time.mean if time else None) for time in times),
                        *(share(found.request_shares[name].mean) for name in accelerators),
                    ]
                )
    return [columns(rows)]


def _errors(summaries: Sequence[Summary]) -> list[str]:
    lines = [f"{s.policy}: {times} x {kind}" for s in summaries for kind, times in s.errors.items()]
    return ["Failed, all seeds together: " + "; ".join(lines)] if lines else []
