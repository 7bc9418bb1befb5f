"""Load on a router whose engines are killed, hung and restarted at random: ``python3 -m bench.soak``."""

import argparse
import asyncio
import sys
from pathlib import Path

import uvloop

from . import report
from .process import Failed
from .run import Plan, Result, soak

OUT = Path(__file__).parents[2] / "out" / "soak"


def main() -> int:
    args = parse_arguments()
    seconds = args.minutes * 60
    plan = Plan(
        seconds=seconds,
        warm_up_s=min(120.0, seconds / 2),
        rate=args.rate,
        engines=args.engines,
        seed=args.seed,
        settings=args.set,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            result = runner.run(soak(plan, args.out, lambda r, p: print(report.line(r, p), flush=True)))
        except Failed as error:
            print(f"bench/soak: {error}", file=sys.stderr)
            return 1
    return finish(result, args.out)


def finish(result: Result, out: Path) -> int:
    """Print and keep the report; exit code 1 when a check failed."""
    text = report.markdown(result)
    (out / "report.md").write_text(text)
    (out / "report.json").write_bytes(report.to_json(result))
    print(f"\nrouter's memory\n{report.curve(result)}\n\n{text}")
    for story in result.tally.stories[:20]:
        print(f"{story['id']} ({story['kind']}) {story['verdict']}: {story['why']}")
    for check in result.failed:
        print(f"FAILED: {check.name}: {check.detail}")
    if result.failed and result.starved:
        print(f"The machine was too busy for these time-outs: {result.lags_s}. Run it again.")
    print(f"{'FAILED' if result.failed else 'passed'}; all figures: {out / 'report.json'}")
    return 1 if result.failed else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.soak", description=__doc__.partition(": ``")[0])
    add = parser.add_argument
    add("--minutes", type=float, default=10.0, help="of load, pauses included; default: 10")
    add("--rate", type=float, default=80.0, metavar="N", help="requests a second; default: 80")
    add("--engines", type=int, default=8, metavar="N", help="default: 8")
    add("--seed", type=int, default=1, metavar="N", help="of requests and faults; default: 1")
    add("--set", action="append", default=[], metavar="A.B=C", help="a setting of the router")
    add("--out", type=Path, default=OUT, metavar="DIR", help="for logs and reports; default: out/soak")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
