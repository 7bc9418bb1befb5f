"""``pointsman bench URL``: load an OpenAI-compatible server and report what it did."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pointsman.errors import SettingsError

if TYPE_CHECKING:
    from pointsman.bench.client import Target
    from pointsman.bench.pace import Arrivals
    from pointsman.bench.run import Load, Progress, Result
    from pointsman.bench.workloads import AnyWorkload

NAME = "bench"
HELP = "load an OpenAI-compatible server and report latencies, throughput and prefix hits"
_KEY_ENV = "OPENAI_API_KEY"
_LINE_EVERY_S = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Sends streamed requests to a server and reports TTFT, TPOT, throughput, goodput and prefix hits. "
        "Open loop (--rate): requests are due at Poisson times whatever the server does, and TTFT counts "
        "from when a request was due. Closed loop (--concurrency): so many requests at once."
    )
    add = parser.add_argument
    add("url", metavar="URL", help="base URL of the server, such as http://localhost:8000")
    add("--model", default="", help="model to ask for; default: the first one of /v1/models")
    add("--api", choices=("completions", "chat"), default="completions", help="default: %(default)s")
    add("--api-key", default="", help=f"sent as Authorization: Bearer; default: ${_KEY_ENV}")
    add("--header", action="append", default=[], metavar="NAME:VALUE", help="sent with each request")
    add("--extra-body", default="", metavar="JSON", help="object of further fields for each request body")
    add(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="ask for exactly the output length (an extension of vLLM and SGLang); default: on",
    )
    add("--insecure", action="store_true", help="do not check the server's certificate")
    add("--timeout", type=float, default=300.0, metavar="S", help="for each request; default: %(default)g")

    load = parser.add_argument_group("load")
    add = load.add_argument
    add("--rate", metavar="R[:S],...", help="requests a second; a list is a ladder of stages, S its seconds")
    add("--concurrency", metavar="N[:S],...", help="requests at once; a list is a ladder of stages")
    add("--duration", type=float, default=30.0, metavar="S", help="of sending, a stage; default: %(default)g")
    add("--requests", type=int, metavar="N", help="requests a stage instead of rate x duration")
    add(
        "--arrivals",
        default="poisson",
        metavar="NAME",
        help="poisson, constant, bursts or day; bursts,cv=3 gives a parameter; default: %(default)s",
    )
    add("--seed", type=int, default=0, help="equal seeds send equal requests; default: %(default)s")
    add("--speed", type=float, default=1.0, metavar="X", help="of a simulated fleet: report in its seconds")

    work = parser.add_argument_group(
        "workload (lengths in tokens, made for about 4 bytes a token)",
        "docs/reference/workloads.md lists the kinds, their parameters and defaults.",
    )
    add = work.add_argument
    add(
        "--workload",
        default="shared-prefix",
        metavar="KIND|FILE",
        help="a kind, or a YAML file that names one as kind; default: %(default)s",
    )
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a parameter of the workload")
    add("--groups", type=int, help="of prompts with the same start")
    add("--prompts-per-group", type=int, metavar="N", help="distinct questions of each group")
    add("--system-prompt-len", type=int, metavar="N", help="shared by a group")
    add("--question-len", type=int, metavar="N", help="what follows it")
    add("--input-len", type=int, metavar="N", help="random: prompt length")
    add("--output-len", type=int, metavar="N", help="length of an output")
    add("--spread", type=float, metavar="F", help="random: lengths vary by this share")
    add("--trace", metavar="FILE", help="trace: the file, in Mooncake's format")
    add("--trace-faster", type=float, metavar="X", help="trace: replay X times as fast")

    out = parser.add_argument_group("report")
    add = out.add_argument
    add("--slo-ttft", type=float, metavar="S", help="a good request's first token comes within S seconds")
    add("--slo-tpot", type=float, metavar="S", help="and its further tokens take at most S seconds each")
    add(
        "--price-per-hour",
        type=float,
        default=0.0,
        metavar="N",
        help="of all endpoints: report tokens per unit",
    )
    add(
        "--watts", type=float, default=0.0, metavar="W", help="that all endpoints draw: report tokens per kWh"
    )
    add("--json", metavar="FILE", help="write all figures; - is standard output instead of the table")
    add("--plot", metavar="FILE", help="write a chart, .svg or .png")


def run(args: argparse.Namespace) -> int:
    import uvloop

    from pointsman.bench.histogram import load_hdrh
    from pointsman.bench.plot import check_plot
    from pointsman.bench.run import check_room

    load_hdrh()
    if args.plot:
        check_plot(args.plot)
    workload = _workload(args)
    loads = _loads(args, workload)
    workload.calls(args.seed)  # a trace that cannot be read is found now
    check_room(loads)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        done, whole = runner.run(_bench(args, loads, workload))
    _report(args, workload, done, whole)
    if not whole:
        return 130
    return 0 if any(stage.ok for stage in done.stages) else 1


def _loads(args: argparse.Namespace, workload: AnyWorkload) -> list[Load]:
    from pointsman.bench.run import Load
    from pointsman.bench.workloads import Trace

    trace = isinstance(workload, Trace)
    if trace and args.rate:
        raise SettingsError("--rate: a trace brings its own times; leave it out or use --trace-faster")
    if bool(args.rate) + bool(args.concurrency) != 1 and not trace:
        raise SettingsError("--rate or --concurrency: give one of them")
    if args.requests is not None and args.requests < 1:
        raise SettingsError("--requests: must be at least 1")
    if args.speed <= 0:
        raise SettingsError("--speed: must be above 0")
    if trace and not args.concurrency:
        return [Load(requests=args.requests)]
    option, text = ("--rate", args.rate) if args.rate else ("--concurrency", args.concurrency)
    arrivals = _arrivals(args.arrivals)
    loads = []
    for part in text.split(","):
        value, seconds = _stage(option, part, args.duration)
        what = {"rate": value} if args.rate else {"concurrency": int(value)}
        loads.append(Load(duration_s=seconds, requests=args.requests, arrivals=arrivals, **what))
    return loads


def _arrivals(text: str) -> Arrivals:
    """``bursts`` or ``bursts,cv=3``."""
    from pointsman.bench.run import Load
    from pointsman.config import convert, override

    name, *parameters = text.split(",")
    tree: dict[str, object] = {"kind": name}
    for parameter in parameters:
        override(tree, parameter)
    given = {"arrivals": tree if parameters else name}
    return convert(given, Load, "--arrivals", lists="docs/reference/workloads.md lists them").arrivals


def _stage(option: str, text: str, default_s: float) -> tuple[float, float]:
    value, colon, seconds = text.partition(":")
    try:
        number, duration_s = float(value), float(seconds) if colon else default_s
    except ValueError as exc:
        raise SettingsError(f"{option}: {text}: write stages as VALUE or VALUE:SECONDS, with commas") from exc
    if not 0 < number < float("inf") or not 0 < duration_s < float("inf"):
        raise SettingsError(f"{option}: {text}: value and seconds must be above 0")
    if option == "--concurrency" and not number.is_integer():
        raise SettingsError(f"{option}: {text}: must be a whole number")
    return number, duration_s


_PARAMETERS = {
    "groups": "groups",
    "prompts_per_group": "prompts_per_group",
    "system_prompt_len": "system_prompt_len",
    "question_len": "question_len",
    "input_len": "input_len",
    "output_len": "output_len",
    "spread": "spread",
    "trace": "path",
    "trace_faster": "faster",
}
"""Options that are parameters of a workload."""


def _workload(args: argparse.Namespace) -> AnyWorkload:
    from pointsman.bench.workloads.reading import read_workload

    given = {
        key: value for option, key in _PARAMETERS.items() if (value := getattr(args, option)) is not None
    }
    if args.workload == "trace" and not (args.trace or args.set):
        raise SettingsError("--trace: the trace workload needs a file")
    return read_workload(args.workload, args.set, given)


async def _bench(args: argparse.Namespace, loads: list[Load], workload: AnyWorkload) -> tuple[Result, bool]:
    """The result, and whether it is the whole run's: Ctrl-C ends it with what has been measured so far."""
    from pointsman.bench.busy import Watch
    from pointsman.bench.client import Client
    from pointsman.bench.pace import Pace
    from pointsman.bench.report import Bill, Slo
    from pointsman.bench.run import Bench, result

    pace = Pace(time.perf_counter, args.speed)
    client = Client(_target(args), pace)
    whole = True
    try:
        model = await client.find_model()
        print(f"{args.url}: model {model}, workload {args.workload}, seed {args.seed}", file=sys.stderr)
        slo = Slo(args.slo_ttft, args.slo_tpot)
        shown = _Shown()
        bill = Bill(args.price_per_hour, args.watts)
        bench = Bench(client, workload, pace, seed=args.seed, slo=slo, bill=bill, on_progress=shown)
        async with Watch(time.perf_counter, time.process_time) as watch:
            try:
                for load in loads:
                    await bench.stage(load)
            except asyncio.CancelledError:
                whole = False
            shown.end()
            return result(bench.stages, watch.busy()), whole
    finally:
        await client.close()


def _target(args: argparse.Namespace) -> Target:
    import msgspec

    from pointsman.bench.client import Target

    headers = []
    for header in args.header:
        name, colon, value = header.partition(":")
        if not colon or not name.strip():
            raise SettingsError(f"--header: {header}: write it as NAME:VALUE")
        headers.append((name.strip(), value.strip()))
    try:
        extra = msgspec.json.decode(args.extra_body, type=dict[str, object]) if args.extra_body else {}
    except (msgspec.DecodeError, UnicodeError) as exc:
        raise SettingsError(f"--extra-body: a JSON object is expected: {exc}") from exc
    return Target(
        url=args.url,
        model=args.model,
        api=args.api,
        api_key=args.api_key or os.environ.get(_KEY_ENV, ""),
        headers=tuple(headers),
        ignore_eos=args.ignore_eos,
        extra=extra,
        timeout_s=args.timeout,
        tls_verify=not args.insecure,
    )


class _Shown:
    """Progress on standard error: one line that changes on a terminal, a line now and then elsewhere."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._next_s = 0.0

    def __call__(self, progress: Progress) -> None:
        text = (
            f"{progress.load.name}: {progress.elapsed_s:.0f} s, {progress.sent} sent, "
            f"{progress.ended} ended, {progress.failed} failed, {progress.output_tokens} output tokens"
        )
        if self._terminal:
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + _LINE_EVERY_S
            print(text, file=sys.stderr)

    def end(self) -> None:
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _report(args: argparse.Namespace, workload: AnyWorkload, done: Result, whole: bool) -> None:
    import msgspec

    from pointsman.bench.plot import plot
    from pointsman.bench.table import remarks, stages_table

    if not whole:
        print("interrupted: requests still running are not in the figures", file=sys.stderr)
    for warning in done.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if args.json:
        written = {
            "pointsman_bench": 1,
            "command": _command(args),
            "workload": msgspec.to_builtins(workload),
            "complete": whole,
            **msgspec.to_builtins(done),
        }
        text = msgspec.json.format(msgspec.json.encode(written)).decode()
        if args.json == "-":
            print(text)
        else:
            _write(args.json, text + "\n")
    if args.json != "-" and done.stages:
        print(stages_table(done.stages))
        for line in remarks(done.stages):
            print(line)
    if args.plot and done.stages:
        plot(done.stages, args.plot)


def _command(args: argparse.Namespace) -> dict[str, object]:
    """All options of the run, without what must stay secret."""
    hidden = ("api_key", "header", "run", "command")
    return {key: value for key, value in vars(args).items() if key not in hidden and not callable(value)}


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text)
    except OSError as exc:
        raise SettingsError(f"--json: {path}: {exc.strerror}") from exc
