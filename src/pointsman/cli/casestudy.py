"""``pointsman casestudy``: the measured three-vendor study beside what policies do to the same pools."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pointsman.errors import SettingsError

if TYPE_CHECKING:
    from pointsman.twin.replay import Constants
    from pointsman.twin.study import Run

NAME = "casestudy"
HELP = "the public three-vendor benchmark and what policies would have done there"
_SCALING_POLICIES = ("k8s-random", "llm-d-blend", "default")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Simulates the pools of a public benchmark (llm-d against a Kubernetes service on H100-NVL, MI325X, "
        "Gaudi3) under any policy and prints them beside what was measured and the pool's fluid bound."
    )
    add = parser.add_argument
    add("--pool", default="", help="3vendor, nv, amd, gaudi or an experiment's name; default: all")
    add("--model", default="", help="granite-4.1-8b or sarvam-30b; default: all")
    add("--rate", default="", metavar="R,...", help="only these stages, after the warm-up; default: all")
    add(
        "--policy",
        action="append",
        default=[],
        metavar="NAME",
        help="a preset or an EndpointPickerConfig file; may be repeated; `all` for every preset; "
        "default: the six that are asked about most",
    )
    add("--seeds", type=int, default=5, metavar="N", help="simulate with seeds 0 to N-1; default: 5")
    add(
        "--jobs",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes; default: all cores",
    )
    add("--stages", metavar="FILE", help="measured runs of your own, a CSV with the study's columns")
    add(
        "--constants",
        metavar="FILE",
        help="engine constants, as `pointsman calibrate` writes them, or `refitted`",
    )
    add("--json", action="store_true", help="a JSON object a line: every stage, policy and seed")
    add("--plot", metavar="FILE", help="write a chart, .svg or .png")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--fidelity", action="store_true", help="replay the measured runs: how far off is the twin?"
    )
    what.add_argument(
        "--scaling",
        action="store_true",
        help="advantage by pool size (4 to 100) and kinds of endpoint (1 to 4)",
    )
    add(
        "--groups",
        type=int,
        metavar="N",
        help="--scaling: prompt groups of every pool; default: 7.5 an endpoint",
    )


def run(args: argparse.Namespace) -> int:
    from pointsman.bench.plot import check_plot

    for name in ("seeds", "jobs"):
        if getattr(args, name) < 1:
            raise SettingsError(f"--{name}: must be at least 1")
    if args.plot:
        if args.fidelity or args.scaling:
            raise SettingsError("--plot: draws the comparison; leave out --fidelity or --scaling")
        check_plot(args.plot)
    if args.scaling:
        return _scaling(args)
    runs, constants = _runs(args), _constants(args)
    return _fidelity(args, runs, constants) if args.fidelity else _compare(args, runs, constants)


def _compare(args: argparse.Namespace, runs: Sequence[Run], constants: Constants) -> int:
    from pointsman.twin import casestudy
    from pointsman.twin import casestudy_tables as tables
    from pointsman.twin.casestudy_plot import plot

    cases = casestudy.cases_of(runs)
    if args.rate:
        rates = _rates(args.rate)
        cases = [casestudy.at_rates(case, rates) for case in cases]
    rows = casestudy.compare(
        cases,
        casestudy.every_policy() if args.policy == ["all"] else args.policy or casestudy.COMPARED,
        range(args.seeds),
        constants=constants,
        jobs=args.jobs,
        on_done=_progress,
    )
    summaries = casestudy.summarise(rows)
    if args.json:
        _print_json(rows)
    else:
        print(tables.comparison(summaries))
    if args.plot:
        plot(summaries, args.plot)
    return 0


def _fidelity(args: argparse.Namespace, runs: Sequence[Run], constants: Constants) -> int:
    from pointsman.twin import casestudy_tables as tables
    from pointsman.twin import fidelity

    rows = fidelity.replay(
        runs,
        range(args.seeds),
        constants=constants,
        jobs=args.jobs,
        on_done=_progress,
    )
    factors = fidelity.factors_of(rows)
    if args.json:
        _print_json((*rows, *factors))
    else:
        print(tables.fidelity(rows), tables.factors(factors), sep="\n\n")
    return 0


def _scaling(args: argparse.Namespace) -> int:
    from pointsman.twin import casestudy_tables as tables
    from pointsman.twin import scaling

    policies = args.policy or _SCALING_POLICIES
    rows = scaling.scale(
        scaling.pools(groups=args.groups),
        policies,
        range(args.seeds),
        jobs=args.jobs,
        on_done=_progress,
    )
    if args.json:
        _print_json(rows)
    else:
        print(tables.scaling(rows, policies[0]))
    return 0


def _runs(args: argparse.Namespace) -> Sequence[Run]:
    from pointsman.twin.study import find_runs, load_study

    return find_runs(load_study(args.stages), args.pool, args.model)


def _constants(args: argparse.Namespace) -> Constants:
    from pointsman.twin.constants import load_constants
    from pointsman.twin.replay import FITTED

    return load_constants(args.constants) if args.constants else FITTED


def _rates(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as exc:
        raise SettingsError(f"--rate: {text}: numbers with commas are expected") from exc


def _print_json(rows: Sequence[object]) -> None:
    import msgspec

    for row in rows:
        print(msgspec.json.encode(row).decode())


def _progress(done: int) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{done} simulated", end="", file=sys.stderr, flush=True)
