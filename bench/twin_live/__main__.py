"""The same fleet and load in the twin and over HTTP: ``python -m bench.twin_live``."""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import uvloop
from msgspec import structs

from pointsman.bench.processes import ProcessFailed

from . import live, report, twin
from .accounts import Accounts
from .accounts import compare as compare_accounts
from .cases import CASES, DEFAULT, POLICIES, Case
from .compare import Row, void

OUT = Path(__file__).parents[2] / "out" / "twin-live"
VOID = 3
"""Exit code when a figure must not be believed."""


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    cases = [with_policies(CASES[name], args.policy) for name in args.case or DEFAULT]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            rows, accounts = runner.run(measure(cases, args.seed or [0], args.tries))
        except ProcessFailed as error:
            print(f"bench/twin_live: {error.message}", file=sys.stderr)
            return 1
    return finish(rows, accounts, args.out)


def with_policies(case: Case, policies: Sequence[str]) -> Case:
    """The case under those of ``policies`` that it has; under all it has when none is named."""
    kept = tuple(policy for policy in case.policies if policy in policies)
    return structs.replace(case, policies=kept) if policies else case


async def measure(cases: Sequence[Case], seeds: Sequence[int], tries: int) -> tuple[list[Row], Accounts]:
    """Everything, one run at a time."""
    with tempfile.TemporaryDirectory(prefix="twin-live-") as name:
        folder = Path(name)
        accounts = await compare_accounts(seeds[0], folder)
        print(f"{len(accounts.live)} requests one at a time: {len(accounts.differ)} counted differently")
        rows = []
        async for row in each_row(cases, seeds, tries, folder):
            print(report.line(row), flush=True)
            rows.append(row)
    return rows, accounts


async def each_row(
    cases: Sequence[Case], seeds: Sequence[int], tries: int, folder: Path
) -> AsyncIterator[Row]:
    for case in cases:
        for policy in case.policies:
            for seed in seeds:
                yield await compare(case, policy, seed, tries, folder)


async def compare(case: Case, policy: str, seed: int, tries: int, folder: Path) -> Row:
    """Both runs; the one over HTTP up to ``tries`` times while it is void."""
    simulated, spread = twin.run(case.scenario, policy, seed), twin.spread(case, policy, seed)
    voided: list[str] = []
    while True:
        measured = await live.run(case, policy, seed, folder)
        reasons = void(simulated, measured, case.speed)
        if not reasons or len(voided) + 1 >= tries:
            break
        voided.append("; ".join(reasons))
        print(f"{case.name}, {policy}: void, once more: {voided[-1]}", flush=True)
    return Row(
        case=case.name,
        policy=policy,
        seed=seed,
        speed=case.speed,
        twin=simulated,
        spread=spread,
        live=measured,
        voided=tuple(voided),
    )


def finish(rows: Sequence[Row], accounts: Accounts, out: Path) -> int:
    """Print and keep the report; exit code 1 when twin and live differ, 3 when something is void."""
    text = report.markdown(rows, accounts)
    (out / "report.md").write_text(text)
    (out / "report.json").write_bytes(report.to_json(rows, accounts))
    print(f"\n{text}\nall figures: {out / 'report.json'}")
    verdicts = {row.verdict for row in rows}
    if accounts.differ or "differs" in verdicts:
        print("DIFFERS")
        return 1
    if "void" in verdicts:
        print("VOID: this machine could not keep up; try again when it is less busy.")
        return VOID
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.twin_live", description=__doc__.partition(": ``")[0])
    add = parser.add_argument
    fleets = ", ".join(f"{case.name} ({case.says})" for case in CASES.values())
    add(
        "--case",
        action="append",
        choices=CASES,
        help=f"may be repeated: {fleets}; default: {', '.join(DEFAULT)}",
    )
    add("--policy", action="append", default=[], choices=POLICIES, help="may be repeated; default: all")
    add("--seed", type=int, action="append", metavar="N", help="may be repeated; default: 0")
    add("--tries", type=int, default=3, metavar="N", help="runs over HTTP while they are void; default: 3")
    add("--out", type=Path, default=OUT, metavar="DIR", help="for the reports; default: out/twin-live")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
