"""``pointsman simulate``: what a policy does to a fleet, in virtual time, by the code that ``serve`` runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pointsman.errors import SettingsError

if TYPE_CHECKING:
    from pointsman.twin.policies import Policy
    from pointsman.twin.scenario import Scenario

T = TypeVar("T")
R = TypeVar("R")

NAME = "simulate"
HELP = "what a policy does to a fleet you describe, in virtual time"
POLICIES = ("default", "round-robin", "k8s-random")
"""Compared when none is named."""
SEEDS = 3
OBJECTIVES = ("output-tok-s", "goodput", "ttft-p99")
MAX_MINUTES = 1440.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Sends a load through the router's own code to simulated model servers, in virtual time, and reports "
        "latencies, throughput and where requests went. Without a file: the case study's 20 endpoints of "
        "three accelerators and its workload."
    )
    add = parser.add_argument
    add("scenario", nargs="*", metavar="SCENARIO", help="YAML file: fleet, workload, stages, incidents")
    add(
        "--policy",
        action="append",
        default=[],
        metavar="NAME",
        help=f"a preset, or an EndpointPickerConfig file; may be repeated; default: {', '.join(POLICIES)}",
    )
    add("--seeds", type=int, default=SEEDS, metavar="N", help="runs of each policy; default: %(default)s")
    add("--seed", type=int, default=0, metavar="N", help="the first of the seeds; default: %(default)s")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override one key of the scenario")
    add("--jobs", type=int, metavar="N", help="processes; default: the number of cores. Changes no figure")
    size = parser.add_argument_group("capacity")
    add = size.add_argument
    add("--capacity", action="store_true", help="find the highest rate that keeps the SLO, by bisection")
    add("--minutes", type=float, default=20.0, metavar="N", help="it must hold for; default: %(default)g")
    tune = parser.add_argument_group("grid")
    add = tune.add_argument
    add(
        "--grid",
        action="append",
        default=[],
        metavar="PLUGIN.KEY=V,V,...",
        help="run the policy with every combination of these weights or parameters and rank them",
    )
    add("--objective", choices=OBJECTIVES, default=OBJECTIVES[0], help="default: %(default)s")
    out = parser.add_argument_group("report")
    add = out.add_argument
    add("--json", action="store_true", help="a JSON object for each policy, seed and stage, then a summary")
    add("--output", metavar="DIR", help="write tables, JSON and charts there")
    add("--decisions", metavar="FILE", help="write the decisions of one policy and one seed, as JSON lines")
    add("--trace", metavar="FILE", help="write the trace of one policy and one seed, for `pointsman plan`")


def run(args: argparse.Namespace) -> int:
    from pointsman.twin.scenario import load_scenario

    scenarios = {Path(path).stem: load_scenario(path, args.set) for path in args.scenario}
    if len(scenarios) < len(args.scenario):
        raise SettingsError("SCENARIO: two files have the same name; tables could not tell them apart")
    if not scenarios:
        scenarios = {"": load_scenario(None, args.set)}
    if len(scenarios) > 1 and not args.grid:
        raise SettingsError("SCENARIO: only a --grid takes several")
    policies = _policies(args)
    if args.seeds < 1:
        raise SettingsError("--seeds: must be at least 1")
    seeds = range(args.seed, args.seed + args.seeds)
    several = len(policies) * len(seeds) > 1 or args.capacity or args.grid
    for option, path in (("--decisions", args.decisions), ("--trace", args.trace)):
        if path and several:
            raise SettingsError(f"{option}: of one run; give one --policy and --seeds 1")
    _prepare(args)
    if args.grid:
        _grid(args, scenarios, policies, seeds)
    else:
        (scenario,) = scenarios.values()
        (_capacity if args.capacity else _compare)(args, scenario, policies, seeds)
    return 0


def _compare(
    args: argparse.Namespace, scenario: Scenario, policies: Sequence[Policy], seeds: Sequence[int]
) -> None:
    from pointsman.twin.compare import Task, simulate, summarise_runs
    from pointsman.twin.plots import draw
    from pointsman.twin.records import lines
    from pointsman.twin.tables import comparison, fleet, legend

    tasks = [
        Task(
            scenario=scenario,
            policy=policy,
            seed=seed,
            decisions=args.decisions or "",
            trace=args.trace or "",
        )
        for policy in policies
        for seed in seeds
    ]
    runs = _each(args, simulate, tasks)
    summaries = summarise_runs(runs)
    slo = None if scenario.slos() else scenario.slo
    _report(
        args,
        "stages",
        "\n\n".join((fleet(scenario), comparison(summaries), legend(summaries))),
        lines(runs, summaries),
        lambda folder: draw(runs, summaries, slo, folder, fleet(scenario)),
    )


def _capacity(
    args: argparse.Namespace, scenario: Scenario, policies: Sequence[Policy], seeds: Sequence[int]
) -> None:
    from pointsman.twin.capacity import Search, capacity
    from pointsman.twin.plots import draw_capacities
    from pointsman.twin.records import capacity_lines
    from pointsman.twin.tables import capacities, fleet, slo_text

    if not 0 < args.minutes <= MAX_MINUTES:
        raise SettingsError(f"--minutes: must be above 0 and at most {MAX_MINUTES:g}")
    searches = [
        Search(scenario=scenario, policy=policy, seeds=tuple(seeds), duration_s=args.minutes * 60)
        for policy in policies
    ]
    held = [each for found in _each(args, capacity, searches) for each in found]
    title = f"Highest Poisson rate held for {args.minutes:g} virtual minutes with {slo_text(scenario)}"
    _report(
        args,
        "capacity",
        f"{fleet(scenario)}\n\n{title}\n\n{capacities(held)}",
        capacity_lines(held),
        lambda folder: draw_capacities(held, folder, f"{fleet(scenario)}\n{title}"),
    )


def _grid(
    args: argparse.Namespace,
    scenarios: Mapping[str, Scenario],
    policies: Sequence[Policy],
    seeds: Sequence[int],
) -> None:
    from pointsman.twin.grid import axis, points, rank
    from pointsman.twin.plots import draw_ranking
    from pointsman.twin.records import grid_lines
    from pointsman.twin.tables import fleet, ranking

    if args.capacity:
        raise SettingsError("--grid, --capacity: one at a time")
    if not args.policy:
        raise SettingsError("--grid: of which preset? Give its --policy")
    axes = [axis(text) for text in args.grid]
    for policy in policies:
        for point in points(policy, axes):
            point.load()
    found = rank(scenarios, policies, axes, seeds, args.objective, partial(_each, args))
    title = "\n".join(f"{name} {fleet(scenario)}".strip() for name, scenario in scenarios.items())
    _report(
        args,
        "grid",
        f"{title}\n\n{ranking(found)}",
        grid_lines(found),
        lambda folder: draw_ranking(found, folder, title),
    )


def _each(args: argparse.Namespace, call: Callable[[T], R], tasks: Sequence[T]) -> list[R]:
    from pointsman.twin.parallel import each

    shown = _Shown(len(tasks))
    try:
        return each(call, tasks, _jobs(args), shown)
    finally:
        shown.end()


def _report(
    args: argparse.Namespace,
    name: str,
    text: str,
    lines: Iterable[str],
    draw: Callable[[Path], Sequence[Path]],
) -> None:
    records = "\n".join(lines)
    print(records if args.json else text)
    if args.output:
        folder = Path(args.output)
        _write(folder / f"{name}.txt", text)
        _write(folder / f"{name}.jsonl", records)
        written = [f"{name}.txt", f"{name}.jsonl", *(chart.name for chart in draw(folder))]
        if not args.json:
            print(f"\nWritten to {folder}: {', '.join(written)}")


def _prepare(args: argparse.Namespace) -> None:
    """What would be a pity to find out after a long run."""
    from pointsman.bench.plot import load_pyplot

    if args.output:
        load_pyplot()
        try:
            Path(args.output).mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise SettingsError(f"--output: {args.output}: {exc.strerror}") from exc


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text + "\n")
    except OSError as exc:
        raise SettingsError(f"--output: {path}: {exc.strerror}") from exc


def _policies(args: argparse.Namespace) -> list[Policy]:
    from pointsman.twin.policies import policy

    names = args.policy or list(POLICIES)
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise SettingsError(f"--policy: {twice} is there twice")
    policies = [policy(name) for name in names]
    for each in policies:
        each.load()
    return policies


def _jobs(args: argparse.Namespace) -> int:
    if args.jobs is None:
        return len(os.sched_getaffinity(0))
    if args.jobs < 1:
        raise SettingsError("--jobs: must be at least 1")
    jobs: int = args.jobs
    return jobs


class _Shown:
    """Progress on standard error when that is a terminal."""

    def __init__(self, runs: int) -> None:
        self._runs = runs
        self._terminal = sys.stderr.isatty()
        self(0)

    def __call__(self, done: int) -> None:
        if self._terminal:
            print(f"\r\x1b[K{done} of {self._runs} runs", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
