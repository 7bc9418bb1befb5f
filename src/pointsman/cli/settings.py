"""The options by which several commands take settings."""

from __future__ import annotations

import argparse

from pointsman.config import Settings, load


def add_settings_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("urls", nargs="*", metavar="URL", help="a model server, such as http://10.0.0.7:8000")
    parser.add_argument(
        "--endpoint", action="append", default=[], metavar="URL", help="the same as an option"
    )
    parser.add_argument("--config", metavar="FILE", help="settings (YAML), or an llm-d EndpointPickerConfig")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one setting: server.port=9000",
    )
    parser.add_argument("--host", help="address of the data port (server.host)")
    parser.add_argument("--port", type=int, help="data port (server.port)")
    parser.add_argument("--admin-port", type=int, help="admin port (admin.port)")


def settings_from(args: argparse.Namespace) -> Settings:
    """The settings tree that the options describe; ``SettingsError`` when they do not fit together."""
    overrides = list(args.set)
    for key, value in (
        ("server.host", args.host),
        ("server.port", args.port),
        ("admin.port", args.admin_port),
    ):
        if value is not None:
            overrides.append(f"{key}={value}")
    return load(args.config, overrides, [*args.urls, *args.endpoint])
