"""The case study as a chart: a row a pool, throughput and time to first token by rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pointsman.bench.plot import load_pyplot, save
from pointsman.twin.casestudy import Summary


def plot(rows: Sequence[Summary], path: str) -> None:
    """Lines are simulated with their 95% confidence, crosses measured, the dashed line is the bound."""
    pyplot = load_pyplot()
    pools = list(dict.fromkeys((row.pool, row.model) for row in rows))
    figure, axes = pyplot.subplots(len(pools), 2, figsize=(13, 4.2 * len(pools)), squeeze=False)
    for (pool, model), (left, right) in zip(pools, axes, strict=True):
        of_pool = [row for row in rows if (row.pool, row.model) == (pool, model)]
        for policy in dict.fromkeys(row.policy for row in of_pool):
            _policy(left, right, policy, sorted(_of(of_pool, policy), key=lambda row: row.rate))
        bound = sorted({(row.rate, row.bound_kv_tok_s) for row in of_pool})
        left.plot(*zip(*bound, strict=True), "k--", label="fluid bound with KV")
        left.set(title=f"{pool}, {model}", ylabel="output tokens a second", ylim=(0, None))
        right.set(title="time to first token, mean", ylabel="seconds", yscale="log")
        for axis in (left, right):
            axis.set_xlabel("requests a second")
            axis.grid(alpha=0.3)
        left.legend(fontsize="small")
    figure.tight_layout()
    save(figure, path)


def _of(rows: Sequence[Summary], policy: str) -> list[Summary]:
    return [row for row in rows if row.policy == policy]


def _policy(left: Any, right: Any, policy: str, rows: Sequence[Summary]) -> None:
    rates = [row.rate for row in rows]
    tok_s = [row.output_tok_s.mean for row in rows]
    within = [row.output_tok_s.ci95 or 0.0 for row in rows]
    (line,) = left.plot(rates, tok_s, marker="o", label=policy)
    colour = line.get_color()
    low = [mean - half for mean, half in zip(tok_s, within, strict=True)]
    high = [mean + half for mean, half in zip(tok_s, within, strict=True)]
    left.fill_between(rates, low, high, color=colour, alpha=0.15)
    right.plot(
        rates, [row.ttft_mean_s.mean if row.ttft_mean_s else None for row in rows], marker="o", color=colour
    )
    measured = [row for row in rows if row.measured_output_tok_s is not None]
    if measured:
        found = [row.rate for row in measured]
        label = f"{policy}, measured"
        left.plot(found, [row.measured_output_tok_s for row in measured], "x", color=colour, label=label)
        right.plot(found, [row.measured_ttft_mean_s for row in measured], "x", color=colour)
