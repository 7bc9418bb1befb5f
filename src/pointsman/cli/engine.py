"""``pointsman engine``: simulated model servers, one or a fleet of them in one process."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import resource
import signal
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pointsman.errors import SettingsError

if TYPE_CHECKING:
    from pointsman.sim.server import SimulatedEngine
    from pointsman.sim.spec import FleetFile

NAME = "engine"
HELP = "simulate model servers over HTTP"
DEFAULT_PORT = 8000
_VARIANTS = (
    "batch_buckets",
    "recompile_s",
    "num_speculative_tokens",
    "prefill_doubling_tokens",
    "step_jitter",
    "max_num_batched_tokens",
    "kv_scale",
    "seed",
)
_OF_ONE_ENGINE = ("port", "model", "accelerator", "set", "kv_events", "kv_events_replay", *_VARIANTS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--port", type=int, metavar="N", help=f"0 picks a free one; default: {DEFAULT_PORT}")
    add("--model", action="append", metavar="NAME", help="name it serves; again for an alias")
    add("--accelerator", metavar="NAME", help="whose speed it has: h100-nvl, mi325x or gaudi3")
    add(
        "--set",
        action="append",
        metavar="KEY=VALUE",
        help="any other key of a fleet file's engine, such as kv_tokens=100000",
    )
    add("--fleet", metavar="FILE", help="run the engines of this YAML file instead")
    add("--host", metavar="ADDRESS", help="address to listen on; default: 127.0.0.1")
    add("--speed", type=float, metavar="X", help="simulated seconds in one of ours; default: 1")
    add(
        "--kv-events",
        metavar="ENDPOINT",
        help="publish KV events here, as in tcp://*:5557; port 0: a free one",
    )
    add("--kv-events-replay", metavar="ENDPOINT", help="where those missed can be had again")
    add("--tokens-per-chunk", type=int, metavar="N", help="tokens a stream sends at once; default: 1")
    add = parser.add_argument_group(
        "variants", "what real engines do and the plain equation leaves out; off by default"
    ).add_argument
    add("--batch-buckets", choices=("cuda-graph", "hpu"), help="decode batches are padded to these sizes")
    add("--recompile-s", type=float, metavar="S", help="a bucket met for the first time is compiled so long")
    add("--num-speculative-tokens", type=int, metavar="K", help="tokens drafted a step for each sequence")
    add("--prefill-doubling-tokens", type=int, metavar="N", help="there a prompt token takes twice as long")
    add(
        "--step-jitter",
        type=float,
        nargs="?",
        const=0.1,
        metavar="SHARE",
        help="standard deviation of a step's duration; 0.1 when no share is given",
    )
    add("--max-num-batched-tokens", type=int, metavar="N", help="token budget of a step")
    add("--kv-scale", type=float, metavar="X", help="factor on the size of the KV cache")
    add("--seed", type=int, metavar="N", help="of what is random")


def run(args: argparse.Namespace) -> int:
    import uvloop

    fleet = _fleet(args)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a file for each connection
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(fleet))


def _fleet(args: argparse.Namespace) -> FleetFile:
    """What to run: the file, or one engine; in both cases with the command line's pace and address."""
    import msgspec

    from pointsman.sim.spec import FleetFile, load_fleet

    if args.fleet is None:
        fields: dict[str, object] = {"engines": [_one_engine(args)]}
    else:
        mixed = next((name for name in _OF_ONE_ENGINE if getattr(args, name) is not None), None)
        if mixed is not None:
            option = mixed.replace("_", "-")
            raise SettingsError(f"--{option}: is for a single engine; write it into the fleet file instead")
        fields = msgspec.structs.asdict(load_fleet(args.fleet))
    for field in ("host", "speed", "tokens_per_chunk"):
        if getattr(args, field) is not None:
            fields[field] = getattr(args, field)
    try:
        return msgspec.convert(msgspec.to_builtins(fields), FleetFile)
    except msgspec.ValidationError as exc:
        raise SettingsError(str(exc)) from exc


def _one_engine(args: argparse.Namespace) -> dict[str, object]:
    import yaml

    fields: dict[str, object] = {"port": DEFAULT_PORT if args.port is None else args.port}
    for field in ("model", "accelerator", *_VARIANTS):
        if getattr(args, field) is not None:
            fields[field] = getattr(args, field)
    if args.kv_events is not None:
        fields["kv_events"] = {"endpoint": args.kv_events, "replay_endpoint": args.kv_events_replay or ""}
    elif args.kv_events_replay is not None:
        raise SettingsError("--kv-events-replay: is for --kv-events; give that, too")
    for setting in args.set or ():
        key, equals, value = setting.partition("=")
        if not equals:
            raise SettingsError(f"--set: {setting!r} is not KEY=VALUE")
        fields[key] = yaml.safe_load(value)
    return fields


async def _serve(fleet: FleetFile) -> int:
    from pointsman.sim.fleet import running_fleet

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with running_fleet(
        fleet.engines, host=fleet.host, speed=fleet.speed, tokens_per_chunk=fleet.tokens_per_chunk
    ) as engines:
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 20, 50)  # requests are freed by reference counts, cycles are rare
        print(report(engines), flush=True)
        await stop.wait()
    return 0


def report(engines: Sequence[SimulatedEngine]) -> str:
    """Each engine in a line, and how to route to them."""
    speed = engines[0].pace.speed
    pace = "" if speed == 1 else f", {speed:g} simulated seconds a second"
    lines = [f"pointsman engine: {len(engines)} simulated (no model, no accelerator{pace})"]
    width = max(len(engine.name) for engine in engines)
    for engine in engines:
        kv, block = engine.engine.kv, engine.engine.parameters.block_tokens
        models = ", ".join(engine.spec.models)
        facts = f"models: {models}  block: {block} tokens  KV: {kv.blocks * block:,} tokens"
        facts += "".join(f"  {key}: {value}" for key, value in engine.spec.variants().said().items())
        lines.append(f"  {engine.name:<{width}}  {engine.url}  {facts}")
        if engine.publisher is not None:
            lines.append(f"  {'':<{width}}  KV events: {engine.publisher}")
    lines.append(f"route to them: pointsman serve {' '.join(engine.url for engine in engines)}")
    return "\n".join(lines)
