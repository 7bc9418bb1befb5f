"""The comparison as charts, each an SVG and a PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from pointsman.bench.plot import load_pyplot, save
from pointsman.bench.report import NO_SLO, Slo
from pointsman.bench.table import count, seconds
from pointsman.twin.capacity import Held
from pointsman.twin.compare import Run, Summary
from pointsman.twin.grid import Ranking
from pointsman.twin.seeds import Mean

_TIMES = ("ttft_p50_s", "ttft_p99_s", "tpot_p99_s")
_SHARES = ("prefix_hit_rate",)
_TWO_DECADES = 100
_ROW_IN = 0.34
"""Height of a policy's bar."""
_MUTED = "#606770"


def draw(
    runs: Sequence[Run], summaries: Sequence[Summary], slo: Slo | None, folder: Path, title: str
) -> list[Path]:
    """The last stage, and with several stages what their rate does; the files written. ``slo`` is that of all
    requests, None where there are classes.
    """
    last = [summary for summary in summaries if summary.stage == len(runs[0].stages) - 1]
    figures = {"policies": _policies(runs, last, slo, title)}
    if len(runs[0].stages) > 1:
        figures["ladder"] = _ladder(summaries, slo, title)
    written = []
    for name, figure in figures.items():
        written += _saved(figure, folder, name)
    return written


def draw_capacities(held: Sequence[Held], folder: Path, title: str) -> list[Path]:
    """The rate that each policy holds; the files written."""
    pyplot = load_pyplot()
    names = list(dict.fromkeys(each.policy for each in held))
    figure, axis = pyplot.subplots(figsize=(8, 1.6 + len(names) * _ROW_IN), layout="constrained")
    most = max(each.failed_rate for each in held)
    for place, name in enumerate(names):
        seeds = [each for each in held if each.policy == name]
        mean = fmean(each.rate for each in seeds)
        axis.barh(place, mean, 0.7, color=pyplot.get_cmap("tab10").colors[place % 10])
        for i, each in enumerate(seeds):
            at = place + 0.5 * ((i + 0.5) / len(seeds) - 0.5)
            axis.plot([each.rate, each.failed_rate], [at, at], color="black", linewidth=2)
        end = max(each.failed_rate for each in seeds)
        axis.annotate(
            count(mean), (end, place), (6, 0), textcoords="offset points", va="center", fontsize="small"
        )
    axis.set_xlim(0, most * 1.15)
    axis.set_xlabel("requests/s; black: each seed, from the rate held to the lowest that was not")
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(title, fontsize="medium")
    return _saved(figure, folder, "capacity")


def draw_ranking(ranked: Ranking, folder: Path, title: str, most: int = 20) -> list[Path]:
    """The best points of a grid; the files written."""
    points = ranked.points[:most]
    figure, axis = load_pyplot().subplots(figsize=(9, 1.6 + len(points) * _ROW_IN), layout="constrained")
    for place, point in enumerate(points):
        axis.barh(place, point.score.mean, 0.7, color="tab:blue")
        if point.score.ci95:
            axis.errorbar(
                point.score.mean, place, xerr=point.score.ci95, color="black", capsize=3, linewidth=1
            )
        end = point.score.mean + (point.score.ci95 or 0.0)
        axis.annotate(
            f"{point.score.mean:.1%}", (end, place), (5, 0), textcoords="offset points", va="center",
            fontsize="small",
        )  # fmt: skip
    axis.set_xlim(0, 1.15 * max(p.score.mean + (p.score.ci95 or 0.0) for p in points))
    axis.xaxis.set_major_formatter(_percent)
    axis.set_yticks(range(len(points)), [point.policy.name.replace(":", ":\n") for point in points])
    axis.tick_params(axis="y", labelsize="x-small")
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    seeds = ranked.points[0].score.seeds
    whiskers = f"; whiskers: 95% confidence interval over {seeds} seeds" if seeds > 1 else ""
    axis.set_title(f"{title}\n{ranked.objective}, relative to the best{whiskers}", fontsize="medium")
    return _saved(figure, folder, "grid")


def _saved(figure: Any, folder: Path, name: str) -> list[Path]:
    paths = [folder / f"{name}.{suffix}" for suffix in ("svg", "png")]
    save(figure, *map(str, paths))
    return paths


def _policies(runs: Sequence[Run], summaries: Sequence[Summary], slo: Slo | None, title: str) -> Any:
    """One stage: what each policy made of it."""
    limits = slo or NO_SLO
    colors = _colors(summaries)
    height = 1.6 + max(4, len(summaries)) * _ROW_IN
    figure, axes = load_pyplot().subplots(
        2, 3, figsize=(15, height + 4.2), layout="constrained", height_ratios=(height, 4)
    )
    (tokens, good, where), (ttft, tpot, kv) = axes
    _bars(tokens, summaries, "output_tok_s", colors, count)
    tokens.set_title("Output tokens/s, drain included")
    _bars(good, summaries, "goodput", colors, count)
    good.set_title(_goodput(slo))
    _shares(where, summaries)
    where.set_title("Where the requests went")
    for axis, times, limit_s in ((ttft, "ttft", limits.ttft_s), (tpot, "tpot", limits.tpot_s)):
        _spread(axis, runs, times, limit_s, colors)
    ttft.set_title("Time to first token: share of requests within")
    tpot.set_title("Time per output token: share of requests within")
    _kv(kv, summaries)
    kv.set_title("KV cache in use: bar the mean, tick the highest")
    handles, labels = ttft.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
    _entitle(figure, f"{title}, {summaries[0].load}", summaries, ladder=False)
    return figure


def _ladder(summaries: Sequence[Summary], slo: Slo | None, title: str) -> Any:
    """Figures against the rate of the stages."""
    limits = slo or NO_SLO
    figure, axes = load_pyplot().subplots(2, 3, figsize=(15, 8.5), layout="constrained")
    panels = (
        ("output_tok_s", "Output tokens/s, drain included", None),
        ("goodput", _goodput(slo), None),
        ("prefix_hit_rate", "Prompt tokens found in prefix caches", None),
        ("ttft_p50_s", "Time to first token, p50", limits.ttft_s),
        ("ttft_p99_s", "Time to first token, p99", limits.ttft_s),
        ("tpot_p99_s", "Time per output token, p99", limits.tpot_s),
    )
    colors = _colors(summaries)
    stages = [s for s in summaries if s.policy == summaries[0].policy]
    rates = [stage.rate or 0.0 for stage in stages]
    by_rate = rates[0] > 0 and all(a < b for a, b in pairwise(rates))
    places = rates if by_rate else [float(i) for i in range(len(stages))]
    for axis, (name, heading, limit_s) in zip(axes.flat, panels, strict=True):
        for policy, color in colors.items():
            mine = [s for s in summaries if s.policy == policy]
            line = [(at, s.figures[name]) for at, s in zip(places, mine, strict=True) if name in s.figures]
            _points(axis, line, name in _TIMES, color=color, label=policy)
        axis.set_title(heading)
        axis.grid(alpha=0.3)
        if name in _TIMES:
            _log_seconds(axis, "y")
            if limit_s is not None:
                axis.axhline(limit_s, color=_MUTED, linestyle=":", linewidth=1)
        elif name in _SHARES:
            axis.set_ylim(0, 1.02)
            axis.yaxis.set_major_formatter(_percent)
        else:
            axis.set_ylim(0, None)
            axis.yaxis.set_major_formatter(_thousands)
        if by_rate:
            axis.set(xlabel="requests/s", xlim=(0, None))
        else:
            axis.set_xticks(places, [stage.load for stage in stages], rotation=30)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
    _entitle(figure, title, summaries, ladder=True)
    return figure


def _points(axis: Any, line: Sequence[tuple[float, Mean]], span: bool, **style: Any) -> None:
    """A line with whiskers: the interval of each mean, or with ``span`` its seeds from lowest to highest."""
    means = [found.mean for _, found in line]
    if span:
        below, above = [f.mean - f.least for _, f in line], [f.most - f.mean for _, f in line]
    else:
        below = above = [f.ci95 or 0.0 for _, f in line]
    axis.errorbar(
        [at for at, _ in line], means, yerr=(below, above), marker="o", markersize=4, capsize=3, **style
    )


def _bars(axis: Any, summaries: Sequence[Summary], name: str, colors: Mapping[str, Any], form: Any) -> None:
    """A bar a policy from zero, the first on top, with its interval as a whisker."""
    most = 0.0
    for place, summary in enumerate(summaries):
        found = summary.figures.get(name, Mean(0.0, None, 1, 0.0, 0.0))
        axis.barh(place, found.mean, 0.7, color=colors[summary.policy])
        end = found.mean + (found.ci95 or 0.0)
        if found.ci95:
            axis.errorbar(found.mean, place, xerr=found.ci95, color="black", capsize=3, linewidth=1)
        axis.annotate(
            form(found.mean), (end, place), (5, 0), textcoords="offset points", va="center", fontsize="small"
        )
        most = max(most, end)
    axis.set_xlim(0, most * 1.18 or 1.0)
    axis.xaxis.set_major_formatter(_thousands)
    _policy_rows(axis, summaries)


def _shares(axis: Any, summaries: Sequence[Summary]) -> None:
    """A row a policy, as long as all its requests, in pieces by accelerator."""
    names = list(summaries[0].accelerators)
    palette = load_pyplot().get_cmap("Pastel1").colors
    for i, name in enumerate(names):
        for place, summary in enumerate(summaries):
            parts = [summary.accelerators[n].request_share.mean for n in names]
            left, width = sum(parts[:i]), parts[i]
            axis.barh(
                place, width, 0.7, left=left, color=palette[i % len(palette)], label="" if place else name
            )
            if width > 0.06:
                axis.text(left + width / 2, place, f"{width:.0%}", ha="center", va="center", fontsize="small")
    axis.set_xlim(0, 1)
    axis.xaxis.set_major_formatter(_percent)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=4, fontsize="small", frameon=False)
    _policy_rows(axis, summaries)


def _spread(
    axis: Any, runs: Sequence[Run], times: str, limit_s: float | None, colors: Mapping[str, Any]
) -> None:
    """The share of answered requests within a time, all seeds together."""
    for policy, color in colors.items():
        spreads = [getattr(run.spreads[-1], times) for run in runs if run.policy == policy]
        points = sorted(value for spread in spreads for value in spread)
        if points:
            axis.plot(points, [(i + 1) / len(points) for i in range(len(points))], color=color, label=policy)
    _log_seconds(axis, "x")
    if limit_s is not None:
        axis.axvline(limit_s, color=_MUTED, linestyle=":", linewidth=1)
        axis.annotate(" SLO", (limit_s, 0.02), color=_MUTED, fontsize="small")
    axis.set_ylim(0, 1)
    axis.yaxis.set_major_formatter(_percent)
    axis.grid(alpha=0.3)


def _kv(axis: Any, summaries: Sequence[Summary]) -> None:
    """For each accelerator a bar a policy."""
    colors = _colors(summaries)
    width = 0.8 / len(summaries)
    names = list(summaries[0].accelerators)
    for i, summary in enumerate(summaries):
        for place, name in enumerate(names):
            part = summary.accelerators[name]
            at = place - 0.4 + (i + 0.5) * width
            axis.bar(at, part.kv_usage_mean.mean, width * 0.9, color=colors[summary.policy])
            most = part.kv_usage_max.mean
            axis.plot([at - width * 0.4, at + width * 0.4], [most, most], color="black", linewidth=1.2)
    axis.set_xticks(range(len(names)), names)
    axis.set_ylim(0, 1.02)
    axis.yaxis.set_major_formatter(_percent)
    axis.grid(alpha=0.3, axis="y")


def _policy_rows(axis: Any, summaries: Sequence[Summary]) -> None:
    axis.set_yticks(range(len(summaries)), [summary.policy for summary in summaries])
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)


def _log_seconds(axis: Any, which: str) -> None:
    """A logarithmic axis of times, labelled as people say them."""
    from matplotlib.ticker import LogLocator

    getattr(axis, f"set_{which}scale")("log")
    scale = getattr(axis, f"{which}axis")
    low, high = scale.get_view_interval()
    scale.set_major_locator(LogLocator(subs=(1, 2, 5) if high < _TWO_DECADES * low else (1,)))
    scale.set_major_formatter(lambda value, _: seconds(value))
    scale.set_minor_formatter(lambda _value, _: "")


def _percent(value: float, _: int) -> str:
    return f"{value:.0%}"


def _thousands(value: float, _: int) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:g}"


def _goodput(slo: Slo | None) -> str:
    if slo is None:
        return "Goodput: requests/s within\nthe SLO of their class"
    limits = [
        f"{name} ≤ {seconds(limit_s)}"
        for name, limit_s in (("TTFT", slo.ttft_s), ("TPOT", slo.tpot_s))
        if limit_s is not None
    ]
    return f"Goodput: requests/s with\n{', '.join(limits) or 'any times'}"


def _colors(summaries: Sequence[Summary]) -> dict[str, Any]:
    names = list(dict.fromkeys(summary.policy for summary in summaries))
    palette = load_pyplot().get_cmap("tab10" if len(names) <= 10 else "tab20").colors
    return {name: palette[i % len(palette)] for i, name in enumerate(names)}


def _entitle(figure: Any, title: str, summaries: Sequence[Summary], *, ladder: bool) -> None:
    seeds = summaries[0].figures["requests"].seeds
    if seeds > 1:
        told = f"means of {seeds} seeds; whiskers: 95% confidence interval"
        told += ", of times: lowest to highest seed" if ladder else ""
    else:
        told = "one seed"
    figure.suptitle(f"Simulated: {title}\n{told}")
