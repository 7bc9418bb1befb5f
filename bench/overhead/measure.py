"""One run: load through a router, CPU read at both ends of the window, and the account that proves real
work.

CPU comes from each process's CPU clock: in nanoseconds the sum over its threads that /proc/PID/stat gives
in ticks of 10 ms. Foreign load is what /proc/stat counts beyond our own processes.
"""

import json
import os
import subprocess
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import setup
from .peers import CLIENT_CORE, Peer, Running
from .workloads import Workload

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
MAX_PACE_LOSS = 0.05  # a paced run at under 95% of its rate is another workload than the one beside it
MAX_SCRAPE_LOSS = 0.10  # a pause of 50 ms and the scrape itself make somewhat less than 20 Hz


def cpu_s(pids: list[int]) -> float:
    """CPU seconds of all threads of these processes so far. The clock id is Linux's make_process_cpuclock."""
    total_ns = 0
    for pid in pids:
        try:
            total_ns += time.clock_gettime_ns((~pid << 3) | 2)
        except OSError:
            continue  # it has ended; the process sets of both samples are compared
    return total_ns / 1e9


def process_tree(root: int) -> list[int]:
    """``root`` and its descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text()
        except OSError:
            continue
        parent = int(stat.rpartition(")")[2].split()[1])
        children.setdefault(parent, []).append(int(entry.name))
    tree = [root]
    for pid in tree:
        tree.extend(children.get(pid, ()))
    return sorted(tree)


def sum_of_status(pids: list[int], key: str, per_thread: bool) -> int:
    """A number of /proc/PID/status, or of every thread's, summed."""
    total = 0
    for pid in pids:
        pattern = f"{pid}/task/*/status" if per_thread else f"{pid}/status"
        for status in Path("/proc").glob(pattern):
            try:
                lines = status.read_text().splitlines()
            except OSError:
                continue
            total += sum(int(line.split()[1]) for line in lines if line.startswith(key))
    return total


def busy_s() -> float:
    """Seconds all cores together were not idle since boot, with time stolen by other machines on the host."""
    fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    idle, iowait = fields[3], fields[4]
    return (sum(fields) - idle - iowait) / TICKS_PER_S


@dataclass(frozen=True)
class Sample:
    """Everything that is read at one instant."""

    at_s: float
    busy_s: float
    router_s: float
    mock_s: float
    loadgen_s: float
    driver_s: float
    wakeups: int  # times the router's threads went to sleep and were woken
    scrapes: int  # GET /metrics the mock servers answered
    router_pids: list[int]

    @property
    def own_s(self) -> float:
        return self.router_s + self.mock_s + self.loadgen_s + self.driver_s


def take_sample(router: Running, mock: Running, loadgen_pid: int) -> Sample:
    pids = process_tree(router.process.pid) if router.process else []
    return Sample(
        at_s=time.monotonic(),
        busy_s=busy_s(),
        router_s=cpu_s(pids),
        mock_s=cpu_s([mock.process.pid]),
        loadgen_s=cpu_s([loadgen_pid]),
        driver_s=time.process_time(),
        wakeups=sum_of_status(pids, "voluntary_ctxt_switches", per_thread=True),
        scrapes=sum(e["scrapes"] for e in counters(mock)),
        router_pids=pids,
    )


def sample_at(word: str, loadgen: subprocess.Popen[str], router: Running, mock: Running) -> Sample:
    """Sample while the load generator stands still at ``word``, then let it go on."""
    said = loadgen.stdout.readline().strip()
    if said != word:
        raise RuntimeError(f"the load generator said {said!r} instead of {word!r}")
    sample = take_sample(router, mock, loadgen.pid)
    loadgen.stdin.write("\n")
    loadgen.stdin.flush()
    return sample


def await_quiet(limit_s: float, foreign_limit: float) -> None:
    """Return when the machine is about idle, or after ``limit_s``: whether a run counts is decided by
    itself.
    """
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        before, started = busy_s(), time.monotonic()
        time.sleep(0.3)
        if (busy_s() - before) / (time.monotonic() - started) < foreign_limit:
            return


def counters(mock: Running) -> list[dict[str, int]]:
    """What each mock endpoint was asked so far."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{mock.ports[0]}/mock/counters", timeout=10) as answer:
        return json.load(answer)


@dataclass
class Run:
    """One measured window. Times per unit in us; loads in cores."""

    workload: str
    peer: str
    cpu_us_per_unit: float
    units_per_s: float
    requests_per_s: float
    router_cores: float
    client_cores: float  # mock and load generator; near 1.0 the client is the limit
    foreign_cores: float
    rss_mb: float
    chunks_per_wakeup: float
    chunks_per_read: float  # as the client reads them
    scrapes_per_s: float
    endpoints_used: int
    client: dict[str, Any]  # the load generator's account
    faults: list[str] = field(default_factory=list)
    dropped: str = ""


def run(
    workload: Workload,
    peer: Peer,
    router: Running,
    mock: Running,
    seed: int,
    duration_s: float | None,
    foreign_limit: float,
) -> Run:
    """Measure one window. It is dropped for foreign load only; faults void it whatever the figures say.

    A seed is used once for each router: prompts it has seen before would match whole.
    """
    before = counters(mock)
    command = [str(setup.LOADGEN), *workload.loadgen_arguments(router.ports, seed, duration_s)]
    with subprocess.Popen(
        ["taskset", "-c", CLIENT_CORE, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as loadgen:
        start, end = (sample_at(word, loadgen, router, mock) for word in ("begin", "end"))
        client = json.loads(loadgen.stdout.readline())
    after = counters(mock)
    elapsed_s = client["elapsed_s"]
    router_s = end.router_s - start.router_s
    done = {
        "request": client["done"],
        "chunk": client["events"],
        "stream": client["events"] / workload.max_tokens,
        "second": elapsed_s,
    }[workload.unit]
    wakeups = end.wakeups - start.wakeups
    foreign = ((end.busy_s - start.busy_s) - (end.own_s - start.own_s)) / (end.at_s - start.at_s)
    result = Run(
        workload=workload.name,
        peer=peer.name,
        cpu_us_per_unit=router_s * 1e6 / done if done else 0.0,
        units_per_s=done / elapsed_s,
        requests_per_s=client["done"] / elapsed_s,
        router_cores=router_s / elapsed_s,
        client_cores=(end.mock_s - start.mock_s + end.loadgen_s - start.loadgen_s) / elapsed_s,
        foreign_cores=max(0.0, foreign),
        rss_mb=sum_of_status(end.router_pids, "VmRSS", per_thread=False) / 1024,
        chunks_per_wakeup=client["events"] / wakeups if wakeups else 0.0,
        chunks_per_read=client["events"] / client["reads"] if client["reads"] else 0.0,
        scrapes_per_s=(end.scrapes - start.scrapes) / elapsed_s,
        endpoints_used=sum(a["generations"] > b["generations"] for a, b in zip(after, before, strict=True)),
        client=client,
    )
    result.faults = faults(workload, peer, result, before, after)
    if start.router_pids != end.router_pids:
        result.faults.append("processes of the router came or went")
    if result.foreign_cores > foreign_limit:
        result.dropped = f"foreign load {result.foreign_cores:.2f} core"
    return result


def faults(
    workload: Workload, peer: Peer, result: Run, before: list[dict[str, int]], after: list[dict[str, int]]
) -> list[str]:
    """Why the run is no measurement of this workload; empty when all is as it should be."""
    client = result.client
    delta = {key: sum(e[key] for e in after) - sum(e[key] for e in before) for key in after[0]}
    found = [f"{client[key]} answers {key}" for key in ("bad_status", "incomplete", "closed") if client[key]]
    if peer.relays_unchanged and client["altered"]:
        found.append(f"{client['altered']} answers altered")
    fewest, most = client["issued"] - client["unfinished"], client["issued"]
    if not fewest <= delta["generations"] <= most:
        found.append(f"{most} requests made {delta['generations']} generations")
    if delta["renders"] or delta["other_posts"]:
        found.append(f"{delta['renders'] + delta['other_posts']} POSTs besides the requests")
    wanted = min(workload.endpoints, client["issued"]) if peer.spreads_evenly else min(2, client["issued"])
    if peer.command and workload.connections > 1 and result.endpoints_used < wanted:
        found.append(f"only {result.endpoints_used} of {workload.endpoints} endpoints got requests")
    expected = workload.expected_chunks_per_s()
    chunks_per_s = client["events"] / client["elapsed_s"]
    if expected and chunks_per_s < expected * (1 - MAX_PACE_LOSS):
        found.append(f"{chunks_per_s:.0f} of {expected:.0f} chunks/s")
    if result.scrapes_per_s < workload.scrapes_per_s * (1 - MAX_SCRAPE_LOSS):
        found.append(f"{result.scrapes_per_s:.0f} of {workload.scrapes_per_s:.0f} scrapes/s")
    if not result.units_per_s:
        found.append("nothing was done in the window")
    return found
