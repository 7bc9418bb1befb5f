"""``pointsman envoy``: Envoy in front of the endpoints, the picker beside it; or Envoy's configuration."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import uvloop

from pointsman.cli.config import check
from pointsman.cli.serve import base_url, describe, first_request
from pointsman.cli.settings import add_settings_arguments, settings_from
from pointsman.config import Settings, check_endpoint
from pointsman.errors import SettingsError

if TYPE_CHECKING:  # they need the extra
    from pointsman.extproc.envoy_process import EnvoyProcess
    from pointsman.extproc.standalone import Ready

SOCKETS = "/run/pointsman"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings_arguments(parser)
    parser.add_argument("--print", action="store_true", help="print Envoy's configuration and start nothing")
    parser.add_argument(
        "--picker",
        metavar="ADDRESS",
        help="with --print: a `pointsman picker` elsewhere, HOST:PORT or unix:PATH, to be asked",
    )
    parser.add_argument(
        "--picker-only", action="store_true", help="start the picker alone, for an Envoy of one's own"
    )
    parser.add_argument(
        "--sockets",
        metavar="FOLDER",
        default=SOCKETS,
        help=f"with --print and --picker-only: where picker and Envoy meet ({SOCKETS})",
    )
    parser.add_argument("--fast-lane", action="store_true", help="ask over HTTP (envoy.fast_lane)")
    parser.add_argument("--envoy-binary", metavar="PATH", help="Envoy's executable (envoy.binary)")
    parser.add_argument("--ready-file", type=int, default=-1, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    try:
        import pointsman.extproc.xds  # noqa: F401 - whether the extra is here
    except ImportError as exc:
        raise SettingsError(f"envoy: {exc.name} is missing; pip install 'pointsman[envoy]'") from exc
    settings = settings_of(args)
    logging.basicConfig(
        level=settings.log.level.upper(),
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    if args.print:
        return _print(args, settings)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        if args.picker_only:
            return runner.run(_picker(settings, Path(args.sockets), args.ready_file))
        return runner.run(_standalone(args))


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings that the options describe, checked as far as that goes without the network."""
    settings = settings_from(args)
    if args.fast_lane:
        settings.envoy.fast_lane = True
    if args.envoy_binary:
        settings.envoy.binary = args.envoy_binary
    for i, endpoint in enumerate(settings.endpoints):
        if check_endpoint(endpoint, f"endpoints[{i}]").prefix:
            raise SettingsError(
                f"endpoints[{i}].url: {endpoint.url}: Envoy takes no path prefix; use `pointsman serve`"
            )
    check(settings)
    return settings


def _print(args: argparse.Namespace, settings: Settings) -> int:
    from pointsman.extproc.envoy_config import Picker, as_yaml, bootstrap
    from pointsman.extproc.standalone import Sockets

    picker = Sockets(Path(args.sockets)).picker
    if args.picker:
        if settings.envoy.fast_lane:
            raise SettingsError("--picker: the fast lane needs --picker-only beside Envoy; see --sockets")
        picker = Picker(requests=args.picker, control=args.picker)
    sys.stdout.write(as_yaml(bootstrap(settings, picker)))
    return 0


# -- the picker alone


async def _picker(settings: Settings, folder: Path, ready_file: int) -> int:
    from pointsman.extproc.standalone import Ready, Sockets, picker

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    settings.log.requests = False  # Envoy writes the lines: it sees all of every request
    await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
    core, front = picker(settings, Sockets(folder))
    async with core.running(front):
        ready = Ready(
            endpoints=[describe(member) for member in core.pool.members.values()],
            models=core.pool.models(),
            admin=f"{settings.admin.host}:{core.admin_port}",
        )
        if ready_file >= 0:
            os.write(ready_file, msgspec.json.encode(ready))
            os.close(ready_file)
        else:
            print(f"picker: ready, at {folder}", flush=True)
        await stop.wait()
    return 0


# -- both


async def _standalone(args: argparse.Namespace) -> int:
    from pointsman.extproc.standalone import PickerEnded, Standalone

    def command(folder: Path, ready_file: int) -> list[str]:
        options = ["--picker-only", "--sockets", str(folder), "--ready-file", str(ready_file)]
        return [sys.executable, "-m", "pointsman", *sys.argv[1:], *options]

    standalone = Standalone(lambda: settings_of(args), command, report)
    try:
        return await standalone.run()
    except PickerEnded as error:
        return error.code or 1


def report(settings: Settings, ready: Ready, envoy: EnvoyProcess) -> None:
    """What start-up found out, and how to send a first request."""
    count = len(ready.endpoints)
    base = base_url(settings.server, envoy.port)
    lane = "fast lane (ext_authz)" if settings.envoy.fast_lane else "ext_proc"
    print(f"pointsman envoy: {count} endpoint{'s' if count != 1 else ''}")
    for line in ready.endpoints:
        print(f"  {line}")
    print(f"policy: {settings.scheduling.picker_config or settings.scheduling.preset}, asked by {lane}")
    print(f"admin:  http://{ready.admin}/endpoints (also /decisions, /metrics, /readyz)")
    print(f"envoy:  http://127.0.0.1:{envoy.admin_port}/stats/prometheus (its own admin page)")
    print(f"base URL: {base}/v1")
    print(first_request(base, ready.models), flush=True)
