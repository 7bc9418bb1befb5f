"""The routers under measurement: their command lines, and starting and stopping them."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from . import setup

ROUTER_CORE = "0"
CLIENT_CORE = "1"  # mock servers and load generator


@dataclass(frozen=True)
class Launch:
    """What a command line is made of."""

    port: int
    spare_port: int  # admin or metrics
    endpoint_ports: list[int]
    settings: dict[str, str]
    directory: Path  # for files the router reads or writes

    @property
    def urls(self) -> list[str]:
        return [f"http://127.0.0.1:{p}" for p in self.endpoint_ports]


@dataclass(frozen=True)
class Peer:
    """A router under measurement.

    ``relays_unchanged``: answers must arrive byte for byte. ``spreads_evenly``: every endpoint must get
    requests.
    """

    name: str
    title: str
    command: Callable[[Launch], list[str]] | None  # None: no router, the client talks to the endpoints
    relays_unchanged: bool = True
    spreads_evenly: bool = True


def _pointsman(*extra: str) -> Callable[[Launch], list[str]]:
    def command(launch: Launch) -> list[str]:
        settings = [part for key, value in launch.settings.items() for part in ("--set", f"{key}={value}")]
        ports = ["--port", str(launch.port), "--admin-port", str(launch.spare_port)]
        python = str(setup.POINTSMAN_PYTHON)
        return [python, "-m", "pointsman", "serve", *launch.urls, *ports, *extra, *settings]

    return command


def _envoy(*, usual: bool) -> Callable[[Launch], list[str]]:
    def command(launch: Launch) -> list[str]:
        config = launch.directory / "envoy.json"
        ports = launch.port, launch.spare_port, launch.endpoint_ports
        config.write_text(
            json.dumps(envoy_config(*ports, log=launch.directory / "requests.log" if usual else None))
        )
        binary = str(setup.VENV / "bin" / "envoy")
        return [binary, "-c", str(config), "--concurrency", "1", "-l", "error", "--disable-hot-restart"]

    return command


def _vllm_router(launch: Launch) -> list[str]:
    binary = str(setup.VENV / "bin" / "vllm-router")
    ports = ["--host", "127.0.0.1", "--port", str(launch.port), "--prometheus-port", str(launch.spare_port)]
    return [
        binary,
        "--worker-urls",
        *launch.urls,
        "--policy",
        "round_robin",
        *ports,
        "--log-level",
        "warning",
    ]


def _smg(policy: str) -> Callable[[Launch], list[str]]:
    def command(launch: Launch) -> list[str]:
        binary = str(setup.VENV / "bin" / "smg")
        metrics = ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(launch.spare_port)]
        quiet = ["--log-level", "warn", "--disable-tokenizer-autoload", "--backend", "vllm"]
        listen = ["--host", "127.0.0.1", "--port", str(launch.port)]
        return [
            binary,
            "launch",
            "--worker-urls",
            *launch.urls,
            "--policy",
            policy,
            *listen,
            *metrics,
            *quiet,
        ]

    return command


def _relay(launch: Launch) -> list[str]:
    script = str(setup.HERE / "relay.py")
    return [str(setup.POINTSMAN_PYTHON), script, str(launch.port), *map(str, launch.endpoint_ports)]


PEERS = {
    p.name: p
    for p in (
        Peer("direct", "no router", None),
        Peer("relay", "Python TCP relay (moves bytes, sees no requests)", _relay, spreads_evenly=False),
        Peer("envoy", "Envoy round robin", _envoy(usual=False)),
        Peer("envoy-usual", "Envoy as a gateway: log, request ids, time-outs, retries", _envoy(usual=True)),
        Peer("vllm-router", "vllm-router round_robin", _vllm_router),
        Peer("smg", "smg round_robin", _smg("round_robin"), relays_unchanged=False),
        Peer(
            "smg-cache", "smg cache_aware", _smg("cache_aware"), relays_unchanged=False, spreads_evenly=False
        ),
        Peer("pointsman", "Pointsman, default", _pointsman(), spreads_evenly=False),
        Peer(
            "pointsman-quiet",
            "Pointsman, default, no line for each request",
            _pointsman("--set", "log.requests=false"),
            spreads_evenly=False,
        ),
        Peer(
            "pointsman-rr",
            "Pointsman, preset round-robin",
            _pointsman("--set", "scheduling.preset=round-robin"),
        ),
        Peer(
            "pointsman-blend",
            "Pointsman, preset llm-d-blend",
            _pointsman("--set", "scheduling.preset=llm-d-blend"),
            spreads_evenly=False,
        ),
    )
}
DEFAULT = ("pointsman", "vllm-router", "smg", "smg-cache")


def envoy_config(
    port: int, admin_port: int, endpoint_ports: list[int], log: Path | None = None
) -> dict[str, object]:
    """The cheapest Envoy that balances: no access log, no request ids, no timeouts, no retries; with ``log``
    all of these, as gateways have them.
    """

    def address(p: int) -> dict[str, object]:
        return {"socket_address": {"address": "127.0.0.1", "port_value": p}}

    extensions = "type.googleapis.com/envoy.extensions.filters"
    route: dict[str, dict[str, object]] = {
        "match": {"prefix": "/"},
        "route": {"cluster": "pool", "timeout": "0s"},
    }
    connection_manager: dict[str, object] = {
        "@type": f"{extensions}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "in",
        "generate_request_id": False,
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        "http_filters": [
            {"name": "router", "typed_config": {"@type": f"{extensions}.http.router.v3.Router"}},
        ],
    }
    if log:
        route["route"] |= {
            "timeout": "300s",
            "retry_policy": {"retry_on": "connect-failure,refused-stream", "num_retries": 2},
        }
        sink = {
            "@type": "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog",
            "path": str(log),
        }
        connection_manager |= {
            "generate_request_id": True,
            "use_remote_address": True,
            "stream_idle_timeout": "60s",
            "access_log": [{"name": "file", "typed_config": sink}],
        }
    filters = [{"name": "http", "typed_config": connection_manager}]
    unlimited = {"max_connections": 100_000, "max_pending_requests": 100_000, "max_requests": 100_000}
    endpoints = [{"endpoint": {"address": address(p)}} for p in endpoint_ports]
    cluster = {
        "name": "pool",
        "type": "STATIC",
        "lb_policy": "ROUND_ROBIN",
        "circuit_breakers": {"thresholds": [unlimited]},
        "load_assignment": {"cluster_name": "pool", "endpoints": [{"lb_endpoints": endpoints}]},
    }
    listener = {"address": address(port), "filter_chains": [{"filters": filters}]}
    return {
        "admin": {"address": address(admin_port)},
        "static_resources": {"listeners": [listener], "clusters": [cluster]},
    }


@dataclass
class Running:
    """A started router or mock: where it listens and its process."""

    name: str
    ports: list[int]
    process: subprocess.Popen[str] | None


class StartError(Exception):
    """A router did not answer; the message names its log."""


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that were free a moment ago."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


@contextlib.contextmanager
def mock_fleet(endpoints: int) -> Iterator[Running]:
    """Mock model servers in one process on the client's core."""
    command = ["taskset", "-c", CLIENT_CORE, str(setup.MOCK), str(endpoints), str(setup.METRICS_PAGE)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        word, *ports = process.stdout.readline().split()
        if word != "ports":
            raise StartError("the mock servers did not start")
        yield Running("mock", [int(p) for p in ports], process)
    finally:
        stop(process)


@contextlib.contextmanager
def router(peer: Peer, endpoint_ports: list[int], settings: dict[str, str], logs: Path) -> Iterator[Running]:
    """The router, answering, on its own core; stopped at the end."""
    if peer.command is None:
        yield Running(peer.name, endpoint_ports, None)
        return
    port, spare_port = free_ports(2)
    logs.mkdir(parents=True, exist_ok=True)
    launch = Launch(port, spare_port, endpoint_ports, settings, logs)
    log = logs / f"{peer.name}.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            ["taskset", "-c", ROUTER_CORE, *peer.command(launch)],
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=logs,
            env=os.environ | {"NO_PROXY": "127.0.0.1"},
        )
        try:
            await_answer(peer, port, process, log)
            yield Running(peer.name, [port], process)
        finally:
            stop(process)


def await_answer(
    peer: Peer, port: int, process: subprocess.Popen[str], log: Path, limit_s: float = 30.0
) -> None:
    """Send requests until one is answered with 200."""
    body = b'{"model":"tiny","messages":[{"role":"user","content":"hi"}],"max_tokens":1}'
    headers = {"content-type": "application/json"}
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline and process.poll() is None:
        request = urllib.request.Request(url, body, headers)
        with contextlib.suppress(OSError):
            if opener.open(request, timeout=5).status == 200:
                return
        time.sleep(0.1)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
    raise StartError(f"{peer.title} gives no answer; the end of {log}:\n{tail}")


def stop(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(3)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()
    if process.stdout:
        process.stdout.close()
