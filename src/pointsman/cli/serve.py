"""``pointsman serve``: the gateway."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import resource
import signal
import sys
import time
from collections.abc import Sequence

import uvloop

from pointsman.cli.settings import add_settings_arguments, settings_from
from pointsman.config import Server, Settings
from pointsman.endpoints.pool import Member
from pointsman.errors import SettingsError
from pointsman.proxy.application import Application
from pointsman.types import Clock


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings_arguments(parser)
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes that move bytes for one that decides (server.workers)",
    )
    # Seconds of its clock in one of ours, for simulated engines that run faster than time.
    parser.add_argument("--clock-speed", type=float, default=1.0, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    if args.workers is not None:
        args.set.append(f"server.workers={args.workers}")
    settings = settings_from(args)
    if settings.server.workers and args.clock_speed != 1.0:
        raise SettingsError("--clock-speed: workers have the machine's clock; leave server.workers at 0")
    logging.basicConfig(
        level=settings.log.level.upper(),
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    open_files()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        speed = args.clock_speed
        return runner.run(_serve(settings, _clock(time.monotonic, speed), _clock(time.time, speed)))


def open_files() -> None:
    """As many as may be: every connection is two."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _clock(clock: Clock, speed: float) -> Clock:
    return clock if speed == 1.0 else lambda: clock() * speed


async def _serve(settings: Settings, clock: Clock, wall: Clock) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    application = Application(settings, clock, wall=wall)
    async with application.running():
        tune_gc()
        print(report(application), flush=True)
        await stop.wait()
        print("draining", file=sys.stderr, flush=True)
    return 0


def tune_gc() -> None:
    """What start-up made stays for good; what requests make is freed by reference counts, cycles are rare."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def report(application: Application) -> str:
    """What start-up found out, and how to send a first request."""
    members = list(application.pool.members.values())
    lines = [f"pointsman serve: {len(members)} endpoint{'s' if len(members) != 1 else ''}"]
    lines += [f"  {describe(member)}" for member in members]
    server, admin = application.settings.server, application.settings.admin
    base = base_url(server, application.port)
    lines.append(
        f"policy: {application.settings.scheduling.picker_config or application.settings.scheduling.preset}"
    )
    lines.append(
        f"admin:  http://{admin.host}:{application.admin_port}/endpoints (also /decisions, /metrics, /readyz)"
    )
    if server.workers:
        lines.append(f"workers: {server.workers}")
    lines.append(f"base URL: {base}/v1")
    lines.append(first_request(base, application.pool.models()))
    return "\n".join(lines)


def base_url(server: Server, port: int) -> str:
    """Where a client on this machine finds the data port."""
    host = "127.0.0.1" if server.host in ("0.0.0.0", "::") else server.host
    host = f"[{host}]" if ":" in host else host
    return f"{'https' if server.tls_cert else 'http'}://{host}:{port}"


def first_request(base: str, models: Sequence[str]) -> str:
    """A line that says how to send one."""
    return (
        f"try: curl {base}/v1/chat/completions -H 'content-type: application/json' "
        f'-d \'{{"model": "{models[0] if models else "MODEL"}", "messages": '
        '[{"role": "user", "content": "Hello"}]}\''
    )


def describe(member: Member) -> str:
    """One endpoint in a line: what it told of itself, and what it did not."""
    endpoint = member.endpoint
    if not member.reached:
        return f"{endpoint.name}  WARNING: does not answer; it will be used as soon as it does"
    metrics = endpoint.metrics
    kv_tokens = metrics.block_tokens * metrics.kv_blocks
    facts = {
        "engine": endpoint.engine,
        "models": ", ".join(sorted(endpoint.models)) if endpoint.models else "",
        "block": f"{metrics.block_tokens} tokens" if metrics.block_tokens else "",
        "KV": f"{kv_tokens:,} tokens" if kv_tokens else "",
        "prefix caching": {True: "on", False: "off", None: ""}[metrics.prefix_caching],
    }
    known = "  ".join(f"{name}: {value}" for name, value in facts.items() if value)
    unknown = ", ".join(name for name, value in facts.items() if not value)
    return f"{endpoint.name}  {known}" + (f"  (not told: {unknown})" if unknown else "")
