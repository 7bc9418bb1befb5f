"""What the demonstration shows at its end: a table, bars in the terminal, and the same as SVG or PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pointsman.bench.demo import BATCH, Measured
from pointsman.bench.plot import load_pyplot
from pointsman.bench.table import bars, columns, count, seconds, share

_POINTS = ("p50", "p90", "p99")
_LEGEND = {
    "loc": "upper center",
    "bbox_to_anchor": (0.5, -0.13),
    "ncols": 2,
    "fontsize": "small",
    "frameon": False,
}
_COLORS = ("#9aa5b1", "#c7a76c", "#7fa37f", "#1f77b4")


def table(runs: Sequence[Measured]) -> str:
    """A line a policy; all times are simulated seconds."""
    accelerators = list(runs[0].accelerators)
    head = ["", "output tok/s", "TTFT p50", "p90", "p99", "TPOT p50", "prefix hits", "within SLO", "failed"]
    rows = [head + [f"to {name}" for name in accelerators]]
    for run in runs:
        stage = run.stage
        tpot = stage.tpot.p50 if stage.tpot else None
        rows.append(
            [
                run.policy,
                count(stage.output_tok_s),
                *(seconds(ttft) for ttft in _ttft(run).values()),
                seconds(tpot),
                share(stage.prefix_hit_rate),
                share(stage.within_slo),
                count(stage.requests - stage.ok),
                *(count(run.accelerators[name]) for name in accelerators),
            ]
        )
    return columns(rows)


def learned(run: Measured, true_s: Mapping[str, float]) -> str:
    """How quick the policy found each accelerator to be, beside the first, and what the simulated engines
    are (``true_s``: their steps); empty when it learns nothing.
    """
    if not run.learned:
        return ""
    first, *others = [name for name in true_s if name in run.learned]
    found = [f"{name} {run.learned[first] / run.learned[name]:.1f}x" for name in others]
    really = [f"{true_s[first] / true_s[name]:.1f}x" for name in others]
    return (
        f"learned: beside {first}, {' and '.join(found)} as quick (decode steps at {BATCH} sequences; "
        f"simulated as {' and '.join(really)})"
    )


def terminal_chart(runs: Sequence[Measured]) -> str:
    """Output tokens a second, TTFT and the share of good requests as bars of text."""
    parts = ["Output tokens a second (more is better)"]
    parts.append(bars([(run.policy, run.stage.output_tok_s, count(run.stage.output_tok_s)) for run in runs]))
    for point in _POINTS[:2]:
        values = [(run.policy, _ttft(run)[point]) for run in runs]
        parts.append(f"\nTime to first token, {point} (less is better)")
        parts.append(bars([(name, value, seconds(value)) for name, value in values]))
    parts.append("\nRequests within SLO: TTFT up to 5 s, TPOT up to 100 ms (more is better)")
    parts.append(
        bars([(run.policy, run.stage.within_slo or 0.0, share(run.stage.within_slo)) for run in runs])
    )
    return "\n".join(parts)


def chart(runs: Sequence[Measured], paths: Sequence[str]) -> None:
    """Throughput, TTFT and where the requests went, written to each of ``paths``."""
    pyplot = load_pyplot()
    names = [run.policy.replace(" ", "\n") for run in runs]
    figure, (tokens, ttft, where) = pyplot.subplots(1, 3, figsize=(14, 4.6), layout="constrained")
    drawn = tokens.bar(names, [run.stage.output_tok_s for run in runs], color=_COLORS[: len(runs)])
    tokens.bar_label(drawn, [count(run.stage.output_tok_s) for run in runs])
    tokens.margins(y=0.1)
    tokens.set(title="output tokens/s (drain included)")
    for i, run in enumerate(runs):
        at = [place + (i - (len(runs) - 1) / 2) * 0.21 for place in range(len(_POINTS))]
        drawn = ttft.bar(at, list(_ttft(run).values()), 0.2, color=_COLORS[i % 4], label=run.policy)
        ttft.bar_label(drawn, [seconds(value) for value in _ttft(run).values()], fontsize=6)
    ttft.set(title="time to first token (s, log scale)", yscale="log")
    ttft.margins(y=0.1)
    ttft.set_xticks(range(len(_POINTS)), _POINTS)
    ttft.legend(**_LEGEND)
    below = [0.0] * len(runs)
    for accelerator in runs[0].accelerators:
        counts = [run.accelerators[accelerator] for run in runs]
        where.bar(names, counts, bottom=below, label=accelerator)
        below = [base + more for base, more in zip(below, counts, strict=True)]
    where.set(title="requests by accelerator")
    where.legend(**_LEGEND)
    figure.suptitle(
        "Simulated engines: 20 endpoints of three accelerators, the same requests for each policy"
    )
    for path in paths:
        figure.savefig(path, bbox_inches="tight", dpi=130)
    pyplot.close(figure)


def _ttft(run: Measured) -> Mapping[str, float]:
    ttft = run.stage.ttft
    return {point: getattr(ttft, point) if ttft else 0.0 for point in _POINTS}
