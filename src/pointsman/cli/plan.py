"""``pointsman plan``: what a recorded load would have met on another fleet."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from pointsman.errors import SettingsError

if TYPE_CHECKING:
    from pointsman.bench.workloads.recorded import Recording
    from pointsman.twin.plan import Result, Source, Task
    from pointsman.twin.plan_cheapest import Found
    from pointsman.twin.plan_fleet import Fleet, Kinds
    from pointsman.twin.policies import Policy

N = TypeVar("N", int, float)

NAME = "plan"
HELP = "what a recorded load would have met on another fleet"
LAST = 20_000
NOT_MODELLED = """\
not modelled: the network and the router's own time; engine options other than the sizes of KV cache, block
and batch (what --max-num-seqs says); endpoints that come, go, fail or change their speed meanwhile; answers
found again in the cache by the next turn; sessions, priorities and adapters being loaded; clients that send
more or less because they are served quicker or slower. Speeds at loads that were not seen while they were
learned are extrapolated."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Replays a trace (of `pointsman serve` with the setting trace.path, or of `pointsman simulate "
        "--trace`) through the router's own code, in virtual time, on engines as fast as was learned of the "
        "recorded ones. First it says how far that is from what happened; then what other fleets and "
        "policies would do."
    )
    parser.epilog = NOT_MODELLED
    add = parser.add_argument
    add("trace", metavar="TRACE", help="the file")
    change = parser.add_argument_group("what to change, all of it together unless --each")
    add = change.add_argument
    add(
        "--add",
        action="append",
        default=[],
        metavar="4xKIND",
        help="endpoints, like recorded ones of that kind",
    )
    add("--remove", action="append", default=[], metavar="NAME", help="an endpoint, 2xKIND, or all of a KIND")
    add(
        "--replace",
        action="append",
        default=[],
        metavar="OLD=NEW",
        help="NAME or KIND by KIND: gaudi3=4xmi325x",
    )
    add("--policy", action="append", default=[], metavar="NAME", help="a preset or EndpointPickerConfig file")
    add("--each", action="store_true", help="each change is an alternative of its own")
    add("--scale", type=float, default=1.0, metavar="X", help="times as many requests a second")
    judge = parser.add_argument_group("what is good")
    add = judge.add_argument
    add("--slo-ttft-ms", type=float, metavar="N", help="of requests that brought no limit of their own")
    add("--slo-tpot-ms", type=float, metavar="N", help="the same for TPOT")
    add("--price", action="append", default=[], metavar="KIND=X", help="of an hour; else the label `price`")
    add("--cheapest", action="store_true", help="find the cheapest fleet of priced kinds that keeps the SLO")
    add(
        "--more",
        type=int,
        default=4,
        metavar="N",
        help="so many more of a kind at most; default: %(default)s",
    )
    how = parser.add_argument_group("how")
    add = how.add_argument
    add("--last", type=int, default=LAST, metavar="N", help="requests, the last ones; default: %(default)s")
    add("--seeds", type=int, default=3, metavar="N", help="replays of each, averaged; default: %(default)s")
    add("--max-num-seqs", action="append", default=[], metavar="KIND=N", help="of its engines; default: 1024")
    add("--jobs", type=int, metavar="N", help="processes; default: the number of cores")
    add("--json", action="store_true", help="JSON instead of tables")


def run(args: argparse.Namespace) -> int:
    from pointsman.bench.report import Slo
    from pointsman.bench.workloads.recorded import read_recording
    from pointsman.twin.plan import Source, Task, merged, policy_of, recorded
    from pointsman.twin.plan_fleet import Kinds, prices_of, recorded_fleet
    from pointsman.twin.plan_tables import Alternative, Report, as_json, as_text, compared

    _check(args)
    recording = read_recording(args.trace, args.last)
    fleet, remarks = recorded_fleet(recording)
    limits = _numbers("--max-num-seqs", args.max_num_seqs, Kinds(fleet), int)
    kinds = Kinds(fleet, list(dict.fromkeys(r.model for r in recording.requests if r.model)), limits)
    fleet = kinds.limited(fleet)
    prices = prices_of(recording, fleet) | _numbers("--price", args.price, kinds, float)
    policy = policy_of(recording.header.policy)
    slo = Slo(*(limit and limit / 1000 for limit in (args.slo_ttft_ms, args.slo_tpot_ms)))
    was = Source(path=args.trace, last=args.last, slo=slo)
    source = Source(path=args.trace, last=args.last, slo=slo, scale=args.scale)
    wanted = [("as recorded", was, fleet, policy)]
    if args.scale != 1.0:
        wanted.append((f"{args.scale:g} x the load", source, fleet, policy))
    wanted += [(name, source, *what) for name, what in _changed(args, fleet, kinds, policy)]
    found = None
    if args.cheapest:
        found = _cheapest(args, recording, fleet, kinds, prices, wanted[-1][3], source)
        if found.fleet:
            wanted.append(("cheapest", source, found.fleet, wanted[-1][3]))
    tasks = [
        Task(source=source, fleet=fleet, policy=policy, seed=seed)
        for _, source, fleet, policy in wanted
        for seed in range(args.seeds)
    ]
    replays = _each(args, tasks)
    results = [merged(replays[i : i + args.seeds]) for i in range(0, len(replays), args.seeds)]
    alternatives = [
        Alternative(name=name, policy=policy.name, fleet=fleet, result=result, price=fleet.price(prices))
        for (name, _, fleet, policy), result in zip(wanted, results, strict=True)
    ]
    happened = recorded(recording, slo)
    errors = compared(happened, replays[: args.seeds])
    remarks += [
        f"no {kind} was recorded: its speed is that of the simulator's {kind}"
        for kind in dict.fromkeys(kind for a in alternatives for kind in a.fleet.counts)
        if kinds.guessed(kind)
    ]
    report = Report(
        recording=recording,
        happened=happened,
        errors=errors,
        alternatives=alternatives,
        remarks=remarks,
        found=found,
    )
    print(as_json(report) if args.json else as_text(report))
    return 0


def _changed(
    args: argparse.Namespace, fleet: Fleet, kinds: Kinds, recorded: Policy
) -> list[tuple[str, tuple[Fleet, Policy]]]:
    """What is to be tried, by name."""
    from pointsman.twin.plan_fleet import add, remove, replace
    from pointsman.twin.policies import policy

    changes: list[tuple[str, Callable[[Fleet], Fleet]]] = [
        *((f"- {text}", partial(remove, change=text)) for text in args.remove),
        *((f"{text}", partial(replace, change=text, kinds=kinds)) for text in args.replace),
        *((f"+ {text}", partial(add, change=text, kinds=kinds)) for text in args.add),
    ]
    fleets = []
    if args.each:
        fleets = [(name, change(fleet)) for name, change in changes]
    elif changes:
        changed = fleet
        for _, change in changes:
            changed = change(changed)
        fleets = [(" ".join(name for name, _ in changes), changed)]
    for name, changed in fleets:
        if not changed.items:
            raise SettingsError(f"--remove: {name} leaves no endpoint")
    policies = [policy(name) for name in args.policy]
    for each in policies:
        each.load()
    if not policies:
        return [(name, (changed, recorded)) for name, changed in fleets]
    if args.each or not fleets:
        fleets = [("same fleet", fleet), *fleets]
    return [(name, (changed, each)) for name, changed in fleets for each in policies]


def _cheapest(
    args: argparse.Namespace,
    recording: Recording,
    fleet: Fleet,
    kinds: Kinds,
    prices: Mapping[str, float],
    policy: Policy,
    source: Source,
) -> Found:
    from pointsman.bench.report import NO_SLO
    from pointsman.twin.plan_cheapest import Search, cheapest

    if source.slo == NO_SLO and not any(r.slo_ttft_ms or r.slo_tpot_ms for r in recording.requests):
        raise SettingsError("--cheapest: give --slo-ttft-ms or --slo-tpot-ms; the requests brought no limits")
    if not prices:
        raise SettingsError(f"--cheapest: no price is known; give --price {next(iter(fleet.counts))}=3.2")
    counts = fleet.counts
    search = Search(
        source=source,
        policy=policy,
        recorded=fleet,
        kinds=kinds,
        prices=prices,
        most={kind: counts.get(kind, 0) + args.more for kind in prices},
        seeds=args.seeds,
        jobs=_jobs(args),
    )
    return cheapest(search, recording, partial(_each, args))


def _each(args: argparse.Namespace, tasks: Sequence[Task]) -> list[Result]:
    from pointsman.twin.parallel import each
    from pointsman.twin.plan import replay

    return each(replay, tasks, _jobs(args))


def _jobs(args: argparse.Namespace) -> int:
    return args.jobs or len(os.sched_getaffinity(0))


def _check(args: argparse.Namespace) -> None:
    for option, value, least in (
        ("--last", args.last, 1),
        ("--seeds", args.seeds, 1),
        ("--jobs", args.jobs, 1),
        ("--more", args.more, 0),
    ):
        if value is not None and value < least:
            raise SettingsError(f"{option}: must be at least {least}")
    for option, value in (
        ("--scale", args.scale),
        ("--slo-ttft-ms", args.slo_ttft_ms),
        ("--slo-tpot-ms", args.slo_tpot_ms),
    ):
        if value is not None and not 0 < value < float("inf"):
            raise SettingsError(f"{option}: must be a number above 0")


def _numbers(option: str, texts: Sequence[str], kinds: Kinds, number: Callable[[str], N]) -> dict[str, N]:
    """``KIND=NUMBER`` of an option, each above 0."""
    found = {}
    for text in texts:
        kind, _, value = text.partition("=")
        try:
            parsed = number(value)
        except ValueError:
            parsed = number("0")
        if not 0 < parsed < float("inf"):
            raise SettingsError(f"{option}: {text!r}: write KIND=NUMBER, as in mi325x=3.2")
        try:
            kinds.find(kind)
        except SettingsError as error:
            raise SettingsError(f"{option}: {error.message}") from error
        found[kind] = parsed
    return found
