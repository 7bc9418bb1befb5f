"""CPU of the endpoint picker, and of the Envoy that asks it: ``python3 -m bench.picker``.

The same traffic goes through Envoy alone (round robin), through Envoy and the picker on our gRPC server, and
through Envoy and the same picker on grpc.aio, taking turns. Envoy and picker share core 0, the load generator
and mock servers of bench/overhead core 1. CPU is each process' own clock.
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.overhead import measure, peers, setup
from bench.overhead.workloads import LONG_SHARED, SHARED, Workload

EXTENSIONS = "type.googleapis.com/envoy.extensions."
DESTINATION = "x-gateway-destination-endpoint"
WORKLOADS = {
    w.name: w
    for w in (
        Workload("P1", "32 KB prompt, 32 connections flat out", "request", 32, **SHARED),
        Workload("P2", "0.5 KB request, 32 connections flat out", "request", 32, own=370),
        Workload("P3", "32 KB prompt, 4 connections, 5 ms pauses", "request", 4, think_us=5_000, **SHARED),
        Workload(
            "P4",
            "64 streams of 100 chunks, 50 chunks/s each",
            "chunk",
            64,
            own=370,
            max_tokens=100,
            stream=True,
            pace_us=20_000,
            stagger_us=31_000,
            warmup_s=2.2,
            duration_s=4.0,
        ),
        Workload("P5", "400 KB prompt, 100 endpoints", "request", 8, endpoints=100, **LONG_SHARED),
    )
}


@dataclass(frozen=True)
class Variant:
    """What stands between client and endpoints. Without a ``server`` Envoy chooses by itself."""

    name: str
    server: str = ""
    responses: str = ""


VARIANTS = (
    Variant("Envoy alone"),
    Variant("ours, closes after the request", "ours", "unseen"),
    Variant("grpc.aio, closes after the request", "grpc.aio", "unseen"),
    Variant("ours, responses through it", "ours", "seen"),
    Variant("grpc.aio, responses through it", "grpc.aio", "seen"),
)


def envoy_config(port: int, admin: int, endpoints: list[int], socket: Path | None) -> dict[str, Any]:
    """bench/overhead's cheapest Envoy; with ``socket`` it asks the picker there, bodies FULL_DUPLEX."""
    config: dict[str, Any] = peers.envoy_config(port, admin, endpoints)
    if socket is None:
        return config
    resources = config["static_resources"]
    manager = resources["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    ask = {
        "@type": f"{EXTENSIONS}filters.http.ext_proc.v3.ExternalProcessor",
        "grpc_service": {"envoy_grpc": {"cluster_name": "picker"}},
        "processing_mode": {
            "request_header_mode": "SEND",
            "response_header_mode": "SEND",
            "request_body_mode": "FULL_DUPLEX_STREAMED",
            "response_body_mode": "FULL_DUPLEX_STREAMED",
            "request_trailer_mode": "SEND",
            "response_trailer_mode": "SEND",
        },
        "message_timeout": "1000s",
    }
    manager["http_filters"].insert(0, {"name": "picker", "typed_config": ask})
    limits = resources["clusters"][0]["circuit_breakers"]
    http2 = {
        "@type": f"{EXTENSIONS}upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": {}},
    }
    address = {"endpoint": {"address": {"pipe": {"path": str(socket)}}}}
    resources["clusters"] = [
        {
            "name": "pool",
            "type": "ORIGINAL_DST",
            "lb_policy": "CLUSTER_PROVIDED",
            "original_dst_lb_config": {"use_http_header": True, "http_header_name": DESTINATION},
            "circuit_breakers": limits,
        },
        {
            "name": "picker",
            "typed_extension_protocol_options": {
                "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": http2
            },
            "circuit_breakers": limits,
            "load_assignment": {"cluster_name": "picker", "endpoints": [{"lb_endpoints": [address]}]},
        },
    ]
    return config


@contextlib.contextmanager
def process(command: list[str], core: str, log: Path, **options: Any) -> Iterator[subprocess.Popen[str]]:
    with log.open("w") as err:
        pinned = ["taskset", "-c", core, *command]
        started = subprocess.Popen(pinned, stderr=err, text=True, **options)
        try:
            yield started
        finally:
            started.send_signal(signal.SIGTERM)
            started.wait(10)


@contextlib.contextmanager
def running(variant: Variant, endpoints: list[int], folder: Path) -> Iterator[tuple[int, list[int]]]:
    """Envoy's port, and the process ids of Envoy and picker."""
    with contextlib.ExitStack() as stack:
        pids, socket = [], None
        if variant.server:
            socket = folder / "picker.sock"
            command = [str(setup.POINTSMAN_PYTHON), str(Path(__file__).with_name("serve.py"))]
            command += [variant.server, str(socket), variant.responses]
            command += [f"http://127.0.0.1:{port}" for port in endpoints]
            log, pipe = folder / "picker.log", subprocess.PIPE
            picker = stack.enter_context(process(command, "0", log, stdout=pipe, cwd=setup.REPO))
            if picker.stdout is None or picker.stdout.readline() != "ready\n":
                raise SystemExit(f"the picker did not start: {log.read_text()}")
            pids = [picker.pid]
        port, admin = peers.free_ports(2)
        config = folder / "envoy.json"
        config.write_text(json.dumps(envoy_config(port, admin, endpoints, socket)))
        binary = str(setup.VENV / "bin" / "envoy")
        command = [binary, "-c", str(config), "--concurrency", "1", "-l", "error", "--disable-hot-restart"]
        log = folder / "envoy.log"
        envoy = stack.enter_context(process(command, "0", log, stdout=subprocess.DEVNULL))
        peers.await_answer(peers.PEERS["envoy"], port, envoy, log)
        yield port, [*measure.process_tree(envoy.pid), *pids]


def window(workload: Workload, port: int, pids: list[int], seed: int) -> dict[str, float]:
    """CPU us a unit of Envoy and of the picker, how much was done, and which share of answers was wrong.

    A picker that closes its stream loses answers where its last two writes are read apart: an endpoint of
    this bench may answer in between.
    """
    command = [str(setup.LOADGEN), *workload.loadgen_arguments([port], seed, None)]
    pipe = subprocess.PIPE
    with subprocess.Popen(["taskset", "-c", "1", *command], stdin=pipe, stdout=pipe, text=True) as load:
        assert load.stdin is not None
        assert load.stdout is not None
        read = []
        for word in ("begin", "end"):
            if load.stdout.readline().strip() != word:
                raise SystemExit("the load generator broke off")
            read.append([measure.cpu_s([pid]) for pid in pids])
            load.stdin.write("\n")
            load.stdin.flush()
        client = json.loads(load.stdout.readline())
    wrong = sum(client[kind] for kind in ("bad_status", "incomplete", "closed"))
    done = client["events"] if workload.unit == "chunk" else client["done"]
    spent = [(end - start) * 1e6 / done for start, end in zip(*read, strict=True)]
    return {
        "envoy": sum(spent[:1]),
        "picker": sum(spent[1:]),
        "per_s": done / client["elapsed_s"],
        "wrong": wrong / client["answered"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.picker", description=__doc__.partition(":")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workloads", default=",".join(WORKLOADS), metavar="A,B")
    args = parser.parse_args()
    try:
        setup.check_machine()
        setup.build_tools()
        setup.install_peers()
    except setup.SetupError as error:
        print(f"bench/picker: {error}", file=sys.stderr)
        return 2
    os.environ["NO_PROXY"] = "127.0.0.1"
    for workload in map(WORKLOADS.__getitem__, args.workloads.split(",")):
        found: dict[str, list[dict[str, float]]] = {v.name: [] for v in VARIANTS}
        with peers.mock_fleet(workload.endpoints) as mock:
            for seed in range(1, args.rounds + 1):
                for variant in VARIANTS:
                    with (
                        tempfile.TemporaryDirectory() as folder,
                        running(variant, mock.ports, Path(folder)) as (port, pids),
                    ):
                        measure.await_quiet(10, 0.2)
                        found[variant.name].append(window(workload, port, pids, int(time.time()) + seed))
        print_table(workload, found)
    return 0


def print_table(workload: Workload, found: dict[str, list[dict[str, float]]]) -> None:
    """Medians with their range, and the ratios that the bars are about."""
    print(f"\n### {workload.name}: {workload.title}\n")
    print(f"| | picker us/{workload.unit} | Envoy us/{workload.unit} | {workload.unit}s/s | answers cut |")
    print("|---|---|---|---|---|")
    for name, runs in found.items():
        cells = [shown([run[key] for run in runs]) for key in ("picker", "envoy", "per_s")]
        cut = max(run["wrong"] for run in runs)
        print(f"| {name} | {' | '.join(cells)} | {f'{cut:.2%} at most' if cut else 'none'} |")
    middle = {name: statistics.median(run["picker"] for run in runs) for name, runs in found.items()}
    bare = statistics.median(run["envoy"] for run in found["Envoy alone"])
    for ours, theirs in ((VARIANTS[1].name, VARIANTS[2].name), (VARIANTS[3].name, VARIANTS[4].name)):
        ratio = middle[ours] / max(middle[theirs], 1e-9)
        print(f"\n{ours}: {ratio:.3f} of grpc.aio, {middle[ours] / bare:.2f} of Envoy alone")
    sys.stdout.flush()


def shown(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} [{min(values):.1f}..{max(values):.1f}]"


if __name__ == "__main__":
    sys.exit(main())
