"""The ``pointsman`` command: each file of this folder that has ``NAME`` and ``run`` is a subcommand."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from pointsman import __version__
from pointsman.errors import SettingsError

SUBCOMMANDS = {
    "serve": "route requests to model servers",
    "picker": "tell Envoy and other gateways which endpoint each request goes to (ext_proc)",
    "envoy": "Envoy in front of model servers, and the picker it asks",
    "config": "check, show or describe the settings",
    "engine": "simulate model servers over HTTP",
    "bench": "measure any OpenAI-compatible URL under load",
    "simulate": "what a policy does to a fleet you describe, in virtual time",
    "plan": "what a recorded load would have met on another fleet",
    "demo": "a simulated fleet under three routers, in two minutes",
    "calibrate": "engine constants for the simulator from benchmark results or a live server",
    "casestudy": "the public three-vendor benchmark and what policies would have done there",
    "conformance": "black-box tests for any endpoint picker behind Envoy's ext_proc",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run a subcommand and exit with its code; a user's mistake is one line and code 2."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = _Parser(prog="pointsman", description="Routes LLM inference by prefix cache and load.")
    parser.add_argument("--version", action="version", version=f"pointsman {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    chosen = next((word for word in arguments if word in SUBCOMMANDS), None)
    for name, text in SUBCOMMANDS.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name == chosen:  # only this one is imported
            importlib.import_module(f"pointsman.cli.{name}").add_arguments(command)
    args = parser.parse_args(arguments)
    try:
        code: int = importlib.import_module(f"pointsman.cli.{args.command}").run(args)
    except SettingsError as error:
        sys.exit(_complain(args.command, error))
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(code)


def _complain(command: str, error: SettingsError) -> int:
    print(f"pointsman {command}: {error.message}", file=sys.stderr)
    return 2
