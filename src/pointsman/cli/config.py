"""``pointsman config``: check, show or describe the settings."""

from __future__ import annotations

import argparse
import sys

import msgspec

from pointsman.cli.settings import add_settings_arguments, settings_from
from pointsman.config import Settings, redacted, reference
from pointsman.proxy.application import Application
from pointsman.proxy.gateway import server_tls


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, text in (
        ("check", "say whether the settings can be used"),
        ("show", "print the settings in force, defaults included, secrets blanked"),
    ):
        action = actions.add_parser(name, help=text)
        add_settings_arguments(action)
    actions.add_parser("schema", help="print the JSON schema of the settings file")
    actions.add_parser("reference", help="print every setting with its default and what it is, as Markdown")


def run(args: argparse.Namespace) -> int:
    if args.action == "schema":
        schema = msgspec.json.encode(msgspec.json.schema(Settings))
        print(msgspec.json.format(schema).decode())
        return 0
    if args.action == "reference":
        sys.stdout.write(reference())
        return 0
    settings = settings_from(args)
    if args.action == "show":
        sys.stdout.write(msgspec.yaml.encode(redacted(settings)).decode())
    else:
        endpoints = check(settings)
        policy = settings.scheduling.picker_config or settings.scheduling.preset
        print(f"ok: {endpoints} endpoint{'s' if endpoints != 1 else ''}, policy {policy}")
    return 0


def check(settings: Settings) -> int:
    """How many endpoints there are; ``SettingsError`` when ``serve`` could not start, the network aside."""
    application = Application(settings)
    if settings.server.tls_cert:
        server_tls(settings.server.tls_cert, settings.server.tls_key)
    return application.core.discovery.check()
