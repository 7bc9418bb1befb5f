"""``pointsman conformance picker``: black-box tests for any endpoint picker that speaks ext_proc."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pointsman.errors import SettingsError

if TYPE_CHECKING:
    from pointsman.conformance.case import Case
    from pointsman.conformance.start import Launch
    from pointsman.conformance.suite import Result

FIRST_PORT = 18100
"""Of the fake endpoints, where the picker's configuration was written before."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("subject", choices=("picker",), help="what is tested")
    add(
        "--cases",
        action="append",
        metavar="PATTERN",
        help="ids such as 'subset-*', a group or a level; again for more",
    )
    add("--list", action="store_true", help="show the cases, run none")
    add("--json", action="store_true", help="results as JSON on standard output")
    add("--tls", action="store_true", help="the picker serves TLS; its certificate is not verified")
    add(
        "--command",
        dest="start",
        metavar="TEXT",
        help="starts the picker: {config} {port} {health_port} {metrics_port} {flags}",
    )
    add(
        "--address",
        metavar="HOST:PORT",
        help="of a picker that runs already, on the configuration of --group",
    )
    add("--group", metavar="NAME", help="the configuration it runs on; default: load")
    add("--health-address", metavar="HOST:PORT", help="of its gRPC health service")
    add("--metrics-url", metavar="URL", help="of its metrics page")
    add(
        "--write-config", metavar="DIR", help="write every configuration there; without --address run nothing"
    )
    add("--first-port", type=int, metavar="N", help=f"of the fake endpoints; default with DIR: {FIRST_PORT}")


def run(args: argparse.Namespace) -> int:
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # else each picker's end is a line of its own
    try:
        from pointsman.conformance import report, suite
    except ModuleNotFoundError as exc:
        if exc.name is None or exc.name.startswith("pointsman"):
            raise
        raise SettingsError(f"conformance: no {exc.name}: pip install 'pointsman[conformance]'") from exc

    cases = suite.chosen(args.cases or ())
    if args.list:
        print(report.listing(cases))
        return 0
    launch = _launch(args)
    with tempfile.TemporaryDirectory(prefix="conformance-") as temporary:
        folder = Path(args.write_config or temporary).absolute()
        if launch is None:
            print(asyncio.run(_write(folder, args.first_port or FIRST_PORT)))
            return 0
        first_port = args.first_port or (FIRST_PORT if args.address else 0)
        try:
            results = asyncio.run(_run(cases, launch, folder, first_port, quiet=args.json))
        except asyncio.CancelledError:
            return 128 + signal.SIGTERM
    if args.json:
        print(report.as_json(results))
    else:
        print(report.summary(results))
    return 1 if any(result.counts for result in results) else 0


def _launch(args: argparse.Namespace) -> Launch | None:
    """How to get at the picker; None where only its configurations are wanted."""
    from pointsman.conformance import start
    from pointsman.conformance.groups import GROUPS
    from pointsman.conformance.subject import Place

    if args.address and args.start:
        raise SettingsError("--address: is of a picker that runs; with --command it is started: give one")
    if not args.address:
        for option in ("group", "health_address", "metrics_url"):
            if getattr(args, option):
                raise SettingsError(f"--{option.replace('_', '-')}: belongs to --address")
        if args.start:
            return start.by_command(start.parse_command(args.start), tls=args.tls)
        return None if args.write_config else start.by_command(start.OWN, tls=args.tls)
    host, colon, port = args.address.rpartition(":")
    if not (host and colon and port.isdigit()):
        raise SettingsError(f"--address: {args.address!r} is not HOST:PORT")
    group = args.group or "load"
    if group not in GROUPS:
        raise SettingsError(f"--group: no configuration is called {group!r}: {', '.join(GROUPS)}")
    place = Place(args.address, args.tls, args.health_address or "", args.metrics_url or "")
    return start.running_at(place, group)


async def _write(folder: Path, first_port: int) -> str:
    """Write every group's configuration; says where and how to go on."""
    from pointsman.conformance import groups
    from pointsman.conformance.engine import Engine

    lines = []
    for name, group in groups.GROUPS.items():
        engines = Engine.of(group.engines, first_port)
        groups.write(folder / name, group, engines)
        lines.append(
            f"{folder / name / groups.CONFIG_FILE}  {group.about}  {' '.join(group.start_flags(False))}"
        )
    lines.append("Start a picker on one of them, then:")
    lines.append(
        f"pointsman conformance picker --address HOST:PORT --group NAME --write-config {folder}"
        + (f" --first-port {first_port}" if first_port != FIRST_PORT else "")
    )
    return "\n".join(lines)


async def _run(
    cases: list[Case], launch: Launch, folder: Path, first_port: int, *, quiet: bool
) -> list[Result]:
    from pointsman.conformance import report, suite

    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)  # pickers are stopped
    width = max(len(case.id) for case in cases)

    def told(result: Result) -> None:
        if not quiet:
            print(report.line(result, width), flush=True)

    return await suite.run(cases, launch, folder, first_port=first_port, told=told)
