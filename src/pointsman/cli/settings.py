"""The options by which several commands take settings."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from pointsman.config import Settings, load, read_yaml
from pointsman.errors import SettingsError


def add_settings_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("urls", nargs="*", metavar="URL", help="a model server, such as http://10.0.0.7:8000")
    parser.add_argument(
        "--endpoint", action="append", default=[], metavar="URL", help="the same as an option"
    )
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="FILE",
        help="settings (YAML), or an llm-d EndpointPickerConfig; give one of each to have both",
    )
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
    settings_file, picker_config = _told_apart(args.config)
    overrides = [] if picker_config is None else [f"scheduling.picker_config={json.dumps(picker_config)}"]
    overrides += args.set
    for key, value in (
        ("server.host", args.host),
        ("server.port", args.port),
        ("admin.port", args.admin_port),
    ):
        if value is not None:
            overrides.append(f"{key}={json.dumps(value)}")
    return load(settings_file, overrides, [*args.urls, *args.endpoint])


def _told_apart(paths: Sequence[str]) -> tuple[str | None, str | None]:
    """The settings file and the EndpointPickerConfig among ``paths``; only the latter has a ``kind``."""
    settings_file = picker_config = None
    for path in paths:
        if "kind" in read_yaml(Path(path)):
            if picker_config is not None:
                raise SettingsError(f"--config {path}: a second picker configuration, after {picker_config}")
            picker_config = path
        else:
            if settings_file is not None:
                raise SettingsError(f"--config {path}: a second settings file, after {settings_file}")
            settings_file = path
    return settings_file, picker_config
