"""Routing by KV events against routing by what was sent, in the twin: the table of
docs/benchmarks/precise.md.

``python -m bench.precise``; CPU time is about 5 s a run.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from msgspec import structs

from pointsman.twin.compare import Summary, Task, simulate, summarise_runs
from pointsman.twin.kv_events import KvEvents
from pointsman.twin.parallel import each
from pointsman.twin.policies import policy
from pointsman.twin.scenario import load_scenario
from pointsman.twin.seeds import Mean

SCENARIO = Path(__file__).parents[1] / "examples/twin/kv-events.yaml"
KNOWN_BY: Mapping[str, KvEvents | None] = {
    "what was sent": None,
    "events after 14 ms": KvEvents(),
    "after 0.5 s": KvEvents(delay_s=0.5),
    "after 5 s": KvEvents(delay_s=5.0),
    "5% lost, had again": KvEvents(loss=0.05),
    "5% lost for good": KvEvents(loss=0.05, replay=False),
}
COLUMNS: Mapping[str, tuple[str, float, str]] = {
    "hit rate": ("prefix_hit_rate", 100, "{:.1f}%"),
    "wrong by (tokens)": ("prediction_error_tokens", 1, "{:.0f}"),
    "TTFT mean": ("ttft_mean_s", 1000, "{:,.0f} ms"),
    "TTFT p99": ("ttft_p99_s", 1, "{:.2f} s"),
    "tok/s": ("output_tok_s", 1, "{:,.0f}"),
}
"""By heading: the figure, the factor to its unit, and how it is written."""


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.precise", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--routers", type=int, nargs="+", default=[1, 3], metavar="N")
    parser.add_argument("--policy", default="default")
    parser.add_argument("--jobs", type=int, default=1, metavar="N")
    asked = parser.parse_args(args)
    print(f"| routers | known by | {' | '.join(COLUMNS)} |")
    print("|---" * (len(COLUMNS) + 2) + "|")
    for routers in asked.routers:
        for name, events in KNOWN_BY.items():
            scenario = load_scenario(SCENARIO, [f"routers.replicas={routers}"])
            scenario = structs.replace(scenario, kv_events=events)
            tasks = [
                Task(scenario=scenario, policy=policy(asked.policy), seed=seed) for seed in range(asked.seeds)
            ]
            (summary,) = summarise_runs(each(simulate, tasks, asked.jobs))
            print(f"| {routers} | {name} | {' | '.join(_cells(summary))} |", flush=True)


def _cells(summary: Summary) -> list[str]:
    return [_cell(summary.figures[figure], factor, form) for figure, factor, form in COLUMNS.values()]


def _cell(found: Mean, factor: float, form: str) -> str:
    written = form.format(found.mean * factor)
    return written if found.ci95 is None else f"{written} ± {form.format(found.ci95 * factor)}"


if __name__ == "__main__":
    main()
