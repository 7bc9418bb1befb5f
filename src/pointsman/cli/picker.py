"""``pointsman picker``: the endpoint picker behind Envoy and other gateways, with llm-d's flags."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import re
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import uvloop

from pointsman.cli.serve import describe, open_files, tune_gc
from pointsman.cli.settings import add_settings_arguments, settings_from
from pointsman.config import Settings, read_yaml
from pointsman.errors import SettingsError
from pointsman.proxy.core import policy_of

if TYPE_CHECKING:  # it needs the extra
    from pointsman.extproc.picker import Picker

METRICS_PORT = 9090
"""llm-d's; our admin pages are there."""

SETTINGS = {
    "grpc-port": ("picker.port", "number"),
    "grpc-health-port": ("picker.health_port", "number"),
    "metrics-port": ("admin.port", "number"),
    "grpc-max-recv-msg-size": ("picker.message_bytes", "number"),
    "secure-serving": ("picker.tls", "flag"),
    "cert-path": ("picker.tls_directory", "text"),
    "enable-cert-reload": ("picker.tls_reload", "flag"),
    "emit-endpoint-scores": ("picker.scores", "flag"),
    "disable-endpoint-subset-filter": ("picker.subsets", "not"),
    "drain-timeout": ("server.drain_s", "duration"),
    "refresh-metrics-interval": ("metrics.interval_s, metrics.idle_interval_s", "duration"),
}
"""llm-d's flags that are settings of ours, and how their values are written.

llm-d reads every endpoint's page that often; who asks for that may have other pickers, whose requests at
endpoints that are idle for us only the page tells.
"""

KUBERNETES = ("pool-name", "pool-namespace", "pool-group", "endpoint-selector", "endpoint-target-ports")
"""Flags that say which pods of a cluster the endpoints are."""

WITHOUT_MEANING = {
    "grpc-max-send-msg-size": "answers are cut to what Envoy takes",
    "metrics-staleness-threshold": "stale metrics never reject a request here",
    "refresh-prometheus-metrics-interval": "metrics are current whenever they are read",
    "tracing": "there are no spans; see GET /decisions",
    "enable-pprof": "there is no Go runtime",
    "health-checking": "gRPC health is always served",
    "ha-enable-leader-election": "every picker decides",
    "enable-grpc-stream-metrics": "see GET /metrics",
    "metrics-endpoint-auth": "the admin port listens on 127.0.0.1 unless admin.host says otherwise",
    "metrics-client-ca-file": "the admin port is plain HTTP",
    "metrics-cert-dir": "the admin port is plain HTTP",
    "tls-min-version": "TLS 1.2 and later",
    "tls-cipher-suites": "those of OpenSSL",
    "allow-experimental-plugins": "all plugins are allowed",
    "kubeconfig": "there is no Kubernetes client",
    "v": "see log.level",
    "zap-devel": "see log.level",
    "zap-encoder": "see log.level",
    "zap-log-level": "see log.level",
    "zap-stacktrace-level": "see log.level",
    "zap-time-encoding": "see log.level",
}
"""Flags that are taken so that a command line still works, and why they change nothing."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings_arguments(parser)
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes that answer for one that decides (server.workers)"
    )
    add = parser.add_argument_group("as llm-d's picker has them").add_argument
    add("--config-file", metavar="FILE", help="EndpointPickerConfig")
    add("--config-text", metavar="YAML", help="the same as text")
    for name, (key, kind) in SETTINGS.items():
        boolean = kind in ("flag", "not")
        extra = {"nargs": "?", "const": "true"} if boolean else {}
        text = f"the opposite of {key}" if kind == "not" else key
        add(f"--{name}", metavar="true|false" if boolean else kind.upper(), help=text, **extra)  # type: ignore[arg-type]
    for name in KUBERNETES:
        add(f"--{name}", metavar="TEXT", help="of Kubernetes, which this version does not read")
    for name in WITHOUT_MEANING:
        dashes = ("-v", "--v") if name == "v" else (f"--{name}",)
        add(*dashes, nargs="?", const="true", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    try:
        import pointsman.extproc.picker  # noqa: F401 - whether the extra is here
    except ImportError as exc:
        raise SettingsError(f"picker: {exc.name} is missing; pip install 'pointsman[picker]'") from exc
    for line in notices(args):
        print(f"pointsman picker: {line}", file=sys.stderr)
    with policy_file(args):
        settings = settings_of(args)
        logging.basicConfig(
            level=settings.log.level.upper(),
            stream=sys.stderr,
            format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        )
        open_files()
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve(settings))


def notices(args: argparse.Namespace) -> list[str]:
    """A line for each flag that was given and changes nothing."""
    given = [name for name in WITHOUT_MEANING if getattr(args, name.replace("-", "_")) is not None]
    lines = [f"--{name} has no effect: {WITHOUT_MEANING[name]}" for name in given]
    if getattr(args, "pool_name", None) is not None:
        lines.append("--pool-name has no effect: the endpoints are those that the settings name")
    return lines


@contextmanager
def policy_file(args: argparse.Namespace) -> Iterator[None]:
    """The picker configuration as one more ``--config``."""
    if args.config_file is not None:
        if args.config_text is not None:
            raise SettingsError("--config-text: there is a --config-file; give one of them")
        if "kind" not in read_yaml(Path(args.config_file)):
            raise SettingsError(f"--config-file {args.config_file}: is no EndpointPickerConfig; see --config")
        args.config.append(args.config_file)
    if args.config_text is None:
        yield
        return
    with tempfile.NamedTemporaryFile("w", prefix="picker-", suffix=".yaml") as file:
        file.write(args.config_text)
        file.flush()
        args.config.append(file.name)
        yield


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings that the flags describe; ``SettingsError`` when there is no endpoint in them."""
    overrides = []
    if not _says_admin_port(args):
        overrides.append(f"admin.port={METRICS_PORT}")
    for name, (key, kind) in SETTINGS.items():
        given = getattr(args, name.replace("-", "_"))
        if given is not None:
            value = json.dumps(_value(name, kind, given))
            overrides += [f"{one}={value}" for one in key.split(", ")]
    if args.host is not None:
        overrides.append(f"picker.host={json.dumps(args.host)}")
    if args.workers is not None:
        overrides.append(f"server.workers={args.workers}")
    if args.port is not None:
        overrides.append(f"picker.port={args.port}")
    args.set = [*overrides, *args.set]
    args.host = args.port = None  # they are of the data port elsewhere
    settings = settings_from(args)
    if not settings.endpoints and not settings.discovery.file and not policy_of(settings).discovery:
        asked = next((name for name in KUBERNETES if getattr(args, name.replace("-", "_")) is not None), "")
        kubernetes = f"--{asked}: this version does not discover endpoints in Kubernetes; " if asked else ""
        raise SettingsError(
            f"{kubernetes}name endpoints, as in `pointsman picker http://10.0.0.7:8000`, or a file of them "
            "(discovery.file, or llm-d's file-discovery)"
        )
    return settings


def _says_admin_port(args: argparse.Namespace) -> bool:
    if args.admin_port is not None or any(text.startswith("admin.port=") for text in args.set):
        return True
    files = [read_yaml(Path(path)) for path in args.config]
    return any(isinstance(tree.get("admin"), dict) and "port" in tree["admin"] for tree in files)


_DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m(?!s))?(?:(\d+(?:\.\d+)?)s)?(?:(\d+(?:\.\d+)?)ms)?")
_BOOLEANS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}


def _value(name: str, kind: str, text: str) -> object:
    """What a flag of Go's says."""
    if kind == "text":
        return text
    if kind == "number" and text.isdecimal():
        return int(text)
    if kind in ("flag", "not") and text.lower() in _BOOLEANS:
        return _BOOLEANS[text.lower()] == (kind == "flag")
    found = _DURATION.fullmatch(text) if kind == "duration" and text else None
    if found:
        hours, minutes, seconds, milliseconds = (float(part or 0) for part in found.groups())
        return hours * 3600 + minutes * 60 + seconds + milliseconds / 1000
    expected = {"number": "a number", "duration": "a duration, such as 50ms or 1m30s"}
    raise SettingsError(f"--{name} {text}: is not {expected.get(kind, 'true or false')}")


async def _serve(settings: Settings) -> int:
    from pointsman.extproc.picker import Picker

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    picker = Picker(settings)
    async with picker.running():
        tune_gc()
        print(report(picker), flush=True)
        await stop.wait()
        print("draining", file=sys.stderr, flush=True)
    return 0


def report(picker: Picker) -> str:
    """What start-up found out, and where gateways and probes are answered."""
    settings, core = picker.settings, picker.core
    own, admin = settings.picker, settings.admin
    members = list(core.pool.members.values())
    lines = [f"pointsman picker: {len(members)} endpoint{'s' if len(members) != 1 else ''}"]
    lines += [f"  {describe(member)}" for member in members]
    lines.append(f"policy: {settings.scheduling.picker_config or settings.scheduling.preset}")
    tls = f"TLS, {own.tls_directory or 'self-signed'}" if own.tls and not own.socket else "no TLS"
    where = f"unix:{own.socket}" if own.socket else f"{own.host}:{picker.port}"
    lines.append(f"ext_proc: {where} ({tls}); responses: {own.responses}")
    if settings.server.workers:
        lines.append(f"workers: {settings.server.workers}")
    if picker.front.health_port:
        lines.append(f"health: {own.host}:{picker.front.health_port}")
    lines.append(
        f"admin:  http://{admin.host}:{picker.admin_port}/endpoints (also /decisions, /metrics, /readyz)"
    )
    return "\n".join(lines)
