"""``pointsman demo``: twenty simulated engines of three accelerators, four ways of routing, one table."""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pointsman.errors import SettingsError

if TYPE_CHECKING:
    from pointsman.bench.demo import Measured, Policy, Scenario
    from pointsman.bench.run import Progress
    from pointsman.bench.site import Site

NAME = "demo"
HELP = "a simulated fleet under four routers, in two minutes"
VOID = 3
"""Exit code when the figures must not be believed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--keep", action="store_true", help="leave the fleet and Pointsman running until Ctrl-C")
    add(
        "--output", default="pointsman-demo", metavar="DIR", help="where the chart goes; default: %(default)s"
    )
    add("--speed", type=float, metavar="X", help="simulated seconds in one of ours; less on a slow machine")
    add("--duration", type=float, metavar="S", help="simulated seconds of sending, for each policy")
    add("--seed", type=int, default=0, help="of the requests; default: %(default)s")


def run(args: argparse.Namespace) -> int:
    import uvloop
    from msgspec.structs import replace

    from pointsman.bench.demo import Scenario
    from pointsman.bench.histogram import load_hdrh
    from pointsman.bench.plot import load_pyplot
    from pointsman.bench.processes import ProcessFailed

    try:
        load_hdrh()
        load_pyplot()
    except SettingsError as exc:
        raise SettingsError("demo needs hdrhistogram and matplotlib: pip install 'pointsman[demo]'") from exc
    scenario = Scenario(seed=args.seed)
    for option, value in (("--speed", args.speed), ("--duration", args.duration)):
        if value is not None and value <= 0:
            raise SettingsError(f"{option}: must be above 0")
    if args.speed:
        scenario = replace(scenario, speed=args.speed)
    if args.duration:
        scenario = replace(scenario, load=replace(scenario.load, duration_s=args.duration))
    output = Path(args.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise SettingsError(f"--output: {output}: {exc.strerror}") from exc
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            return runner.run(_demo(scenario, output, keep=args.keep))
        except ProcessFailed as exc:
            print(f"pointsman demo: {exc.message}", file=sys.stderr)
            return 1


async def _demo(scenario: Scenario, output: Path, *, keep: bool) -> int:
    from pointsman.bench.demo import POLICIES, measure, site_of

    began_s = time.perf_counter()
    print(_introduction(scenario), flush=True)
    runs: list[Measured] = []
    clocks = time.perf_counter, time.process_time
    with tempfile.TemporaryDirectory(prefix="pointsman-demo-") as folder:
        for policy in POLICIES:
            async with site_of(scenario, policy, Path(folder)) as at:
                shown = _Shown(policy)
                runs.append(await measure(scenario, policy, at, clocks, shown))
                shown.end(runs[-1])
                if policy is POLICIES[-1]:
                    void = _report(scenario, runs, output, time.perf_counter() - began_s)
                    if keep:
                        await _stay(at)
    return VOID if void else 0


def _introduction(scenario: Scenario) -> str:
    engines = ", ".join(f"{n} {name}" for name, n in scenario.engines.items())
    load, work = scenario.load, scenario.workload
    assert load.rate is not None
    return (
        f"The {sum(scenario.engines.values())} engines of this demo are simulated ({engines}; "
        "granite-4.1-8b, constants fitted to public runs); HTTP, router and load generator are real.\n"
        f"{load.rate * load.duration_s:.0f} requests at {load.rate:g} a second: {work.groups} shared "
        f"prefixes of {work.system_prompt_len} tokens, questions of {work.question_len}, answers of "
        f"{work.output_len}. Times are simulated seconds, {scenario.speed:g} in one of ours."
    )


class _Shown:
    """Live progress of a policy: one line that changes on a terminal, a line now and then elsewhere."""

    def __init__(self, policy: Policy) -> None:
        self._name = policy.name
        self._terminal = sys.stdout.isatty()
        self._next_s = 0.0

    def __call__(self, progress: Progress) -> None:
        warm = progress.load.rate is not None and progress.load.rate < 50
        tokens_s = progress.output_tokens / max(progress.elapsed_s, 1e-9)
        text = (
            f"{self._name:<20} {'warm-up ' if warm else ''}{progress.elapsed_s:5.0f} s  "
            f"{progress.sent:5} sent  {progress.ended:5} ended  {tokens_s:7,.0f} tok/s"
        )
        if self._terminal:
            print(f"\r\x1b[K{text}", end="", flush=True)
        elif time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + 5.0
            print(text, flush=True)

    def end(self, run: Measured) -> None:
        stage = run.stage
        ttft = stage.ttft.p50 if stage.ttft else 0.0
        cpu = ", ".join(f"{name} {lag.cpu_share:.0%}" for name, lag in run.lags.items())
        clear = "\r\x1b[K" if self._terminal else ""
        print(
            f"{clear}{self._name:<20} {stage.output_tok_s:,.0f} tok/s, TTFT p50 {ttft:.2f} s, "
            f"{stage.makespan_s:.0f} s simulated (CPU: {cpu})",
            flush=True,
        )


def _report(scenario: Scenario, runs: list[Measured], output: Path, took_s: float) -> bool:
    """Print everything; whether the figures are void."""
    from pointsman.bench.demo_report import chart, learned, table, terminal_chart

    paths = [str(output / f"pointsman-demo.{suffix}") for suffix in ("svg", "png")]
    chart(runs, paths)
    print(f"\n{table(runs)}")
    told = [learned(run, scenario.steps_s()) for run in runs]
    print("\n".join(filter(None, told)), end="\n\n")
    print(f"{terminal_chart(runs)}\n")
    print(f"Chart: {' and '.join(paths)}. Done in {took_s:.0f} s.")
    void = [reason for run in runs for reason in run.void()]
    if void:
        print("\nVOID: this machine could not keep up with simulated time; try again with a lower --speed.")
        print("\n".join(f"  {reason}" for reason in void))
    print("\nYour own servers: pointsman serve http://your-vllm-1:8000 http://your-vllm-2:8000")
    return bool(void)


async def _stay(at: Site) -> None:
    print(f"\nStill running until Ctrl-C: Pointsman at {at.url}/v1, its admin port at {at.admin_url}")
    print(f"engines: {' '.join(at.engines.values())}", flush=True)
    await asyncio.Event().wait()
