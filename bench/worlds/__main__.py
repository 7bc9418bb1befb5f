"""The default policy and others in many worlds of the twin, against bars: ``python -m bench.worlds``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pointsman.errors import SettingsError
from pointsman.scheduling.presets import DEFAULT
from pointsman.twin.compare import Task, simulate, summarise_runs
from pointsman.twin.parallel import each
from pointsman.twin.policies import Policy, policy

from . import report
from .catalogue import QUICK, World, load_worlds
from .report import Told
from .verdict import LLM_D, judge, to_other

POLICIES = (
    *(DEFAULT, LLM_D, "llm-d-affinity", "round-robin", "least-request"),
    *("learned-capacity", "cache-aware", "dynamo"),
)
SEEDS, QUICK_SEEDS = 3, 2


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        worlds = load_worlds(args.worlds or (QUICK if args.quick else ()))
        policies = [policy(name) for name in dict.fromkeys((DEFAULT, LLM_D, *args.policies))]
    except SettingsError as error:
        print(f"bench/worlds: {error}", file=sys.stderr)
        return 2
    seeds = range(args.seeds or (QUICK_SEEDS if args.quick else SEEDS))
    told = []
    for world in worlds:
        told.append(tell(world, policies, seeds, args.jobs))
        print(report.line(told[-1]), flush=True)
    print(f"\n{report.markdown(told)}")
    if args.json:
        args.json.write_bytes(report.to_json(told))
    return 1 if any(one.judged.outcome == "misses" for one in told) else 0


def tell(world: World, policies: Sequence[Policy], seeds: Sequence[int], jobs: int = 1) -> Told:
    """All runs of one world; the first policy is judged."""
    tasks = [Task(scenario=world.scenario, policy=one, seed=seed) for one in policies for seed in seeds]
    runs = each(simulate, tasks, jobs)
    judged = policies[0].name
    return Told(
        world=world,
        summaries=tuple(summarise_runs(runs)),
        to_llm_d=to_other(runs, judged, LLM_D),
        judged=judge(world, runs, judged),
    )


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.worlds", description=__doc__.partition(": ``")[0])
    add = parser.add_argument
    add("--worlds", type=_names, default=[], metavar="A,B", help="default: all")
    add("--policies", type=_names, default=list(POLICIES), metavar="A,B",
        help=f"that {DEFAULT} and {LLM_D} are held against; default: {', '.join(POLICIES[2:])}")  # fmt: skip
    add("--seeds", type=_positive, metavar="N", help=f"runs of each policy in each world; default: {SEEDS}")
    add(
        "--quick",
        action="store_true",
        help=f"{QUICK_SEEDS} seeds and {len(QUICK)} worlds: {', '.join(QUICK)}",
    )
    add("--jobs", type=_positive, default=1, metavar="N", help="processes; default: 1")
    add("--json", type=Path, metavar="FILE", help="write all figures there")
    return parser.parse_args(argv)


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
