"""The default policy with less to go by, against itself with everything: ``python -m bench.worlds.evidence``.

A picker sees no responses; a router of several sees late what the others do. Each is given the same arrivals
as one router that sees all, and held to a share of its output tokens a second.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence

import msgspec

from pointsman.bench.table import seconds
from pointsman.errors import SettingsError
from pointsman.scheduling.presets import DEFAULT
from pointsman.twin.compare import Run, Task, metric, simulate
from pointsman.twin.parallel import each
from pointsman.twin.policies import policy
from pointsman.twin.routers import Routers
from pointsman.twin.seeds import mean_of
from pointsman.twin.tables import with_interval

from .catalogue import World, load_worlds
from .verdict import Bar

FULL = Routers()
LESS: dict[str, tuple[Routers, float]] = {
    "picker": (Routers(evidence="picker"), 0.95),
    "picker, told a second late": (Routers(evidence="picker", completion_delay_s=1.0), 0.95),
    "1 router, view 0 ms old": (Routers(), 0.97),
    "4 routers, view 50 ms old": (Routers(replicas=4, view_s=0.05), 0.93),
    "20 routers, view 500 ms old": (Routers(replicas=20, view_s=0.5), 0.85),
}
"""What is seen, and the share of the throughput that must be left."""
SEEDS = 5


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        worlds = load_worlds(args.worlds)
    except SettingsError as error:
        print(f"bench/worlds: {error}", file=sys.stderr)
        return 2
    missed = False
    print("| world | what is seen | tok/s of one router that sees all | TTFT p99 | verdict |")
    print("|---|---|---|---|---|")
    for world in worlds:
        seeds = range(args.first_seed, args.first_seed + args.seeds)
        full = runs_of(world, FULL, seeds, args.jobs)
        for name, (routers, share) in LESS.items():
            runs = full if routers == FULL else runs_of(world, routers, seeds, args.jobs)
            bar = judged(name, share, runs, full)
            missed |= bar.outcome == "misses"
            ratio = with_interval(bar.found, lambda value: f"{value:.3f}")
            ttft_s = mean_of([metric(run.stages[-1], "ttft_p99_s") or 0.0 for run in runs])
            verdict = f"at least {share}: {bar.outcome}"
            print(
                f"| {world.name} | {name} | {ratio} | {with_interval(ttft_s, seconds)} | {verdict} |",
                flush=True,
            )
    return 1 if missed else 0


def runs_of(world: World, routers: Routers, seeds: Iterable[int], jobs: int = 1) -> list[Run]:
    """The world with these routers in front of it."""
    scenario = msgspec.structs.replace(world.scenario, routers=routers)
    default = policy(DEFAULT)
    return each(simulate, [Task(scenario=scenario, policy=default, seed=s) for s in seeds], jobs)


def judged(name: str, share: float, runs: Sequence[Run], full: Sequence[Run]) -> Bar:
    """Output tokens a second as a share of what the same seeds gave with everything seen."""
    ratios = [
        (metric(run.stages[-1], "output_tok_s") or 0.0) / (metric(other.stages[-1], "output_tok_s") or 1.0)
        for run, other in zip(runs, full, strict=True)
    ]
    return Bar(name=name, found=mean_of(ratios), limit=share)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.worlds.evidence", description=__doc__)
    add = parser.add_argument
    add(
        "--worlds",
        type=lambda text: text.split(","),
        default=["base-85"],
        metavar="A,B",
        help="default: base-85",
    )
    add("--seeds", type=int, default=SEEDS, metavar="N", help="default: %(default)s")
    add("--first-seed", type=int, default=0, metavar="N", help="default: %(default)s")
    add("--jobs", type=int, default=1, metavar="N", help="processes; default: 1")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
