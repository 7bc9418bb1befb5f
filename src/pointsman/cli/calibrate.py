"""``pointsman calibrate``: constants of an engine from benchmark results or from a live server."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pointsman.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pointsman.sim.profiles import EngineParameters
    from pointsman.twin.calibrate import Fit, Range, Trade
    from pointsman.twin.probe import Probed, Settings
    from pointsman.twin.study import Run

NAME = "calibrate"
HELP = "engine constants for the simulator from benchmark results or a live server"
_KEY_ENV = "OPENAI_API_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Finds the constants with which a simulated engine behaves as the real one: from the study's runs, "
        "from your own runs, or by probing a server that nobody else uses. Runs of several kinds of server "
        "are left out: what the constants say of a mixed pool is a prediction."
    )
    source = parser.add_mutually_exclusive_group()
    add = source.add_argument
    add("--stages", metavar="FILE", help="a CSV with the study's columns; default: the study's own")
    add("--results", metavar="DIR", help="a report folder of inference-perf with its config.yaml")
    add("--url", metavar="URL", help="an OpenAI-compatible server, probed for about a minute")

    known = parser.add_argument_group("the servers")
    add = known.add_argument
    add("--pool", default="", help="--stages: only this pool or experiment")
    add("--model", default="", help="--stages: only this model; otherwise its name")
    add(
        "--accelerator",
        default="",
        metavar="NAME",
        help="--results, --url: what the servers are to be called",
    )
    add("--endpoints", type=int, default=1, metavar="N", help="--results: servers behind the URL; default: 1")
    add(
        "--router",
        choices=("k8s", "llmd"),
        default="k8s",
        help="--results: spread at random or by llm-d; default: k8s",
    )
    add("--kv-tokens", type=int, metavar="N", help="size of the KV cache where known; otherwise fitted")
    add("--block-tokens", type=int, metavar="N", help="of a KV block; default: 16, or what the server says")
    add(
        "--max-num-seqs",
        type=int,
        metavar="N",
        help="sequences at once; default: 256, the study's as known",
    )
    add("--max-num-batched-tokens", type=int, metavar="N", help="token budget of a step; default: 8192")
    add("--speed", type=float, default=1.0, metavar="X", help="--url: of a simulated engine; default: 1")
    add("--api-key", default="", help=f"--url: sent as Authorization: Bearer; default: ${_KEY_ENV}")

    how = parser.add_argument_group("the fit")
    add = how.add_argument
    add("--evaluations", type=int, default=80, metavar="N", help="replays of the runs; default: %(default)s")
    add(
        "--sensitivity",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="how well each constant is known and which trade off; default: on",
    )
    add(
        "--router-cost",
        action="store_true",
        help="--stages: instead of engines, the delay of llm-d's router, on its single-vendor runs",
    )
    add("--jobs", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="default: all cores")
    add("--output", metavar="FILE", help="write the constants as YAML, for casestudy --constants")
    add("--json", action="store_true", help="a JSON object a kind of server instead of tables")


def run(args: argparse.Namespace) -> int:
    for name in ("evaluations", "jobs", "endpoints"):
        if getattr(args, name) < 1:
            raise SettingsError(f"--{name}: must be at least 1")
    if args.router_cost:
        return _fit_router(args)
    return _probe(args) if args.url else _fit(args)


def _fit(args: argparse.Namespace) -> int:
    from pointsman.twin import calibrate_tables as tables
    from pointsman.twin.calibrate import single_kind
    from pointsman.twin.parallel import each

    kinds = single_kind(_runs(args))
    if not kinds:
        raise SettingsError("--stages: no run of one kind of server alone; mixed pools cannot be fitted")
    fields = tuple(f for f in _fields() if f != "kv_tokens" or not args.kv_tokens)
    work = [
        (runs, _start(args, *kind), fields, args.evaluations, args.sensitivity)
        for kind, runs in kinds.items()
    ]
    found = each(_fit_one, work, args.jobs, lambda done: _progress(f"{done} of {len(work)} kinds of server"))
    _write(args, {(fit.accelerator, fit.model): fit.found for fit, _, _ in found})
    for fit, ranges, trades in found:
        if args.json:
            _print_json({"fit": fit, "ranges": ranges, "trades": trades})
        else:
            print(tables.fitted(fit, ranges, trades), end="\n\n")
    return 0


def _fit_one(
    work: tuple[Sequence[Run], EngineParameters, Sequence[str], int, bool],
) -> tuple[Fit, list[Range], list[Trade]]:
    from pointsman.twin.calibrate import TRADED, fit, ranges, trades

    runs, start, fields, evaluations, sensitivity = work
    found, error = fit(runs, start, fields=fields, evaluations=evaluations)
    if not sensitivity:
        return found, [], []
    pairs = [pair for pair in TRADED if set(pair) <= set(fields)]
    return found, ranges(error, found.found, fields), trades(error, found.found, pairs)


def _fit_router(args: argparse.Namespace) -> int:
    from pointsman.twin import router_delay

    found, factor = router_delay.fit(_runs(args), on_try=lambda _, factor: _progress(f"factor {factor:.3f}"))
    if args.json:
        _print_json({"router": found, "ttft_factor": factor})
    else:
        print(f"delay {found.delay_s * 1e3:.0f} ms, {found.stream_s * 1e3:.2f} ms a running sequence")
        print(f"typical factor between simulated and measured mean TTFT: {factor:.3f}")
    return 0


def _probe(args: argparse.Namespace) -> int:
    import asyncio

    import uvloop

    from pointsman.twin import calibrate_tables as tables

    settings = _settings(args)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        model, found = runner.run(_ask(args, settings))
    _write(args, {(args.accelerator or "probed", model): found.parameters})
    if args.json:
        _print_json(found)
    else:
        print(f"{args.accelerator or 'probed'} {model}")
        print(tables.probed(found))
    return 0


async def _ask(args: argparse.Namespace, settings: Settings) -> tuple[str, Probed]:
    import time

    from pointsman.bench.client import Client, Target
    from pointsman.bench.pace import Pace
    from pointsman.twin.probe import probe

    if args.speed <= 0:
        raise SettingsError("--speed: must be above 0")
    pace = Pace(time.perf_counter, args.speed)
    api_key = args.api_key or os.environ.get(_KEY_ENV, "")
    client = Client(Target(url=args.url, model=args.model, api_key=api_key), pace)
    try:
        model = await client.find_model()
        found = await probe(client, pace, settings, _progress)
    finally:
        await client.close()
    _progress("")
    return model, found


def _settings(args: argparse.Namespace) -> Settings:
    """What the server's metrics page says of its KV cache, unless told here."""
    from pointsman.twin.probe import Settings, kv_cache_of

    kv_tokens, block_tokens = args.kv_tokens, args.block_tokens
    if not (kv_tokens and block_tokens):
        told = kv_cache_of(args.url)
        kv_tokens, block_tokens = kv_tokens or told[0], block_tokens or told[1]
    if not kv_tokens:
        raise SettingsError("--kv-tokens: the server's metrics do not tell; its log does")
    return Settings(
        kv_tokens=kv_tokens,
        block_tokens=block_tokens or 16,
        max_sequences=args.max_num_seqs or 256,
        step_tokens=args.max_num_batched_tokens or 8192,
    )


def _runs(args: argparse.Namespace) -> Sequence[Run]:
    from pointsman.twin.inference_perf import read_results
    from pointsman.twin.study import find_runs, load_study

    if not args.results:
        return find_runs(load_study(args.stages), args.pool, args.model)
    if not args.accelerator:
        raise SettingsError("--accelerator: give the servers a name")
    return [
        read_results(args.results, args.accelerator, args.endpoints, router=args.router, model=args.model)
    ]


def _start(args: argparse.Namespace, accelerator: str, model: str) -> EngineParameters:
    """Where to search from: constants known of such a server, or those of another."""
    from msgspec import structs

    from pointsman.sim.profiles import GRANITE, PARAMETERS

    known = PARAMETERS.get((accelerator, model))
    start = known or structs.replace(PARAMETERS["h100-nvl", GRANITE], max_sequences=256)
    given = {
        "kv_tokens": args.kv_tokens,
        "block_tokens": args.block_tokens,
        "max_sequences": args.max_num_seqs,
        "step_tokens": args.max_num_batched_tokens,
    }
    return structs.replace(start, **{field: value for field, value in given.items() if value})


def _fields() -> tuple[str, ...]:
    from pointsman.twin.calibrate import FIELDS

    return FIELDS


def _write(args: argparse.Namespace, constants: dict[tuple[str, str], EngineParameters]) -> None:
    from pointsman.twin.constants import dump_constants

    if not args.output:
        return
    try:
        Path(args.output).write_text(dump_constants(constants))
    except OSError as exc:
        raise SettingsError(f"--output: {args.output}: {exc.strerror}") from exc


def _print_json(value: object) -> None:
    import msgspec

    print(msgspec.json.encode(value).decode())


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
