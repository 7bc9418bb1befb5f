"""CPU per request, latency and prefix hits of ``serve --workers N`` beside one process: ``python3 -m
bench.workers``.

Load generator, mock servers and workloads are those of bench/overhead, but for the number of connections.
Mock and load generator have core 1; the router's processes share core 0, or with ``--cores 0,1`` both. What
is measured is the CPU that a request costs in all of them together. How throughput grows with cores cannot
be seen on two.
"""

import argparse
import contextlib
import dataclasses
import json
import re
import statistics
import sys
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..overhead import measure, peers, setup
from ..overhead.peers import Launch, Peer, Running
from ..overhead.report import spread, table, with_interval
from ..overhead.workloads import WORKLOADS

OUT = setup.REPO / "out" / "bench-workers"
DEFAULT = ("W1", "W2", "L1")


def peer(workers: int) -> Peer:
    """Pointsman with so many workers."""

    def command(launch: Launch) -> list[str]:
        ports = ["--port", str(launch.port), "--admin-port", str(launch.spare_port)]
        python = str(setup.POINTSMAN_PYTHON)
        return [python, "-m", "pointsman", "serve", *launch.urls, *ports, "--workers", str(workers)]

    title = f"{workers} workers" if workers else "one process"
    return Peer(f"workers-{workers}", title, command, spreads_evenly=False)


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Prompt tokens so far, and how many of them were believed to be in a cache."""

    prompt: float
    cached: float


def tokens(admin_port: int) -> Tokens:
    """As the router's metrics page tells."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{admin_port}/metrics", timeout=10) as answer:
        page = answer.read().decode()

    def of(kind: str) -> float:
        found = re.findall(rf'^pointsman_tokens_total{{.*kind="{kind}"}} (\S+)$', page, re.MULTILINE)
        return sum(map(float, found))

    return Tokens(of("estimated_prompt"), of("estimated_cached"))


def admin_port(log: Path) -> int:
    """Where the router that writes this says its admin pages are; it serves a little before it says so."""
    for _ in range(100):
        found = re.findall(r"admin: +http://127\.0\.0\.1:(\d+)/", log.read_text())
        if found:
            return int(found[-1])
        time.sleep(0.1)
    raise peers.StartError(f"{log} does not tell the admin port")


def measured(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Round after round; in each, every number of workers, all freshly started, with the same prompts."""
    for pair in range(args.pairs):
        with contextlib.ExitStack() as stack:
            mock = stack.enter_context(peers.mock_fleet(8))
            routers: dict[int, tuple[Running, int]] = {}
            for workers in args.workers:
                running = stack.enter_context(peers.router(peer(workers), mock.ports, {}, OUT / "logs"))
                routers[workers] = running, admin_port(OUT / "logs" / f"{peer(workers).name}.log")
            time.sleep(0.5)
            for name in args.workloads:
                order = args.workers if pair % 2 == 0 else args.workers[::-1]
                for workers in order:
                    running, admin = routers[workers]
                    for connections in args.connections if WORKLOADS[name].flat_out else [0]:
                        yield one(args, pair, name, connections, workers, running, admin, mock)


def one(
    args: argparse.Namespace,
    pair: int,
    name: str,
    connections: int,
    workers: int,
    running: Running,
    admin: int,
    mock: Running,
) -> dict[str, object]:
    """A run that is not disturbed by others, or the last try."""
    workload = WORKLOADS[name]
    if connections:
        workload = dataclasses.replace(workload, connections=connections)
    for attempt in range(args.tries):
        measure.await_quiet(8.0, args.foreign_limit)
        before = tokens(admin)
        seed = zlib.crc32(f"{name}/{connections}/{pair}/{attempt}".encode())
        run = measure.run(workload, peer(workers), running, mock, seed, args.duration, args.foreign_limit)
        after = tokens(admin)
        if not run.dropped:
            break
    prompt = after.prompt - before.prompt
    hit_rate = (after.cached - before.cached) / prompt if prompt else 0.0
    print(
        f"{name:3} connections {workload.connections} workers {workers}"
        f" {run.cpu_us_per_unit:7.1f} us/{workload.unit}"
        f" {run.units_per_s:7.0f}/s router {run.router_cores:.2f} client {run.client_cores:.2f}"
        f" hits {hit_rate:.4f} p50 {run.client['latency_us']['p50']} us"
        f" {'; '.join(run.faults)} {run.dropped}",
        flush=True,
    )
    found = {"pair": pair, "connections": workload.connections, "workers": workers}
    return found | {"hit_rate": hit_rate} | dataclasses.asdict(run)


def report(records: Sequence[dict[str, object]]) -> str:
    """A table for each workload: medians, and the ratio to one process in the same round."""
    lines = []
    usable = [r for r in records if not r["dropped"] and not r["faults"]]
    for name, connections in dict.fromkeys((r["workload"], r["connections"]) for r in records):
        workload = WORKLOADS[name]
        title = workload.title.replace("32 connections", f"{connections} connections")
        lines += ["", f"{name}: {title}", ""]
        here = [r for r in usable if (r["workload"], r["connections"]) == (name, connections)]
        alone = {r["pair"]: r for r in here if r["workers"] == 0}
        rows = []
        for workers in dict.fromkeys(r["workers"] for r in records):
            runs = [r for r in here if r["workers"] == workers]
            pairs = [(r, alone[r["pair"]]) for r in runs if r["pair"] in alone]

            def of(read: Callable[[dict[str, object]], float], digits: int, runs=runs) -> str:
                return spread([read(r) for r in runs], digits)

            rows.append(
                (
                    str(workers),
                    of(lambda r: r["cpu_us_per_unit"], 1),
                    with_interval([a["cpu_us_per_unit"] / b["cpu_us_per_unit"] for a, b in pairs]),
                    of(lambda r: r["client"]["latency_us"]["p50"], 0),
                    of(lambda r: r["client"]["latency_us"]["p99"], 0),
                    of(lambda r: r["hit_rate"] * 100, 2),
                    of(lambda r: r["rss_mb"], 0),
                )
            )
        head = (
            "workers",
            f"CPU us per {workload.unit}",
            "to one process",
            "p50 us",
            "p99 us",
            "hits %",
            "RSS MB",
        )
        lines += table(head, rows)
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.workers", description=__doc__.partition(": ``")[0])
    parser.add_argument("--pairs", type=int, default=3, help="rounds (6 give a 95%% interval)")
    parser.add_argument("--workers", type=lambda text: [*map(int, text.split(","))], default=[0, 1, 2, 4])
    parser.add_argument(
        "--connections",
        type=lambda text: [*map(int, text.split(","))],
        default=[32, 128],
        help="of the workloads that run flat out",
    )
    parser.add_argument("--cores", default=peers.ROUTER_CORE, help="of the router, as taskset takes them")
    parser.add_argument("--workloads", type=lambda text: text.split(","), default=list(DEFAULT))
    parser.add_argument("--duration", type=float, metavar="S", help="instead of each workload's own")
    parser.add_argument("--foreign-limit", type=float, default=0.25, metavar="CORES")
    parser.add_argument("--tries", type=int, default=3, help="for a run that others disturb")
    args = parser.parse_args()
    peers.ROUTER_CORE = args.cores
    try:
        setup.check_machine()
        setup.build_tools()
    except setup.SetupError as error:
        print(f"bench/workers: {error}", file=sys.stderr)
        return 2
    OUT.mkdir(parents=True, exist_ok=True)
    raw = OUT / f"runs-{time.strftime('%Y%m%d-%H%M%S')}.jsonl"
    records = []
    with raw.open("w") as out:
        for record in measured(args):
            records.append(record)
            out.write(json.dumps(record) + "\n")
    text = report(records)
    print(text, f"\nraw runs: {raw}")
    worst = [r for r in records if r["faults"]]
    return 1 if worst or not statistics.fmean(bool(r["units_per_s"]) for r in records) else 0


if __name__ == "__main__":
    sys.exit(main())
