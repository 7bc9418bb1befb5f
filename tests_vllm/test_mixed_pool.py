"""Two real vLLM servers, one with a third of the other's time, behind the default policy: who gets how many
requests.

Both have turns on one core (``throttle.py``); the router and its clients have the other. The servers' turns
are swapped in mid-run, and round robin has the same load before and after. The router knows nothing of
either server at first.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from tests_vllm.servers import Engine, Gateway, get
from tests_vllm.throttle import Turns, cpu_s

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        len(os.sched_getaffinity(0)) < 2, reason="needs a core for the engines and one beside it"
    ),
]

ENGINE_CORE, OTHER_CORE = 1, 0
QUICK, SLOW = 0.75, 0.25
"""Of the engines' core."""
WINDOW_S = 5.0
ROUND_ROBIN_WINDOWS = 3
BEFORE_WINDOWS = 6
AFTER_WINDOWS = 8
"""Of five seconds: 30 s of the default policy from nothing, and 40 s from the swap."""
CLIENTS = 24
WORK = (
    *("--workload", "shared-prefix", "--groups", "12", "--prompts-per-group", "2000"),
    *("--system-prompt-len", "400", "--question-len", "200", "--output-len", "24"),
)
ROOMY = ("--max-num-seqs", "64", "--num-gpu-blocks-override", "4096")
"""As many sequences as there are clients, so that what an engine gets depends on how quick it is."""


@dataclass(frozen=True)
class Window:
    """Five seconds of a run."""

    requests: tuple[int, int]
    """Answered by each engine."""
    core: tuple[float, float]
    """Of the core that each engine used."""

    def share(self, engine: int) -> float:
        """Of the requests."""
        return self.requests[engine] / sum(self.requests)

    @property
    def per_s(self) -> float:
        return sum(self.requests) / WINDOW_S

    def __str__(self) -> str:
        return (
            f"{self.share(0):4.0%} / {self.share(1):4.0%} of {self.per_s:5.1f} requests/s,"
            f" {self.core[0]:.2f} / {self.core[1]:.2f} of the core"
        )


class Pool:
    """Both engines and who has how much time."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.engines = engines
        self._turns = Turns(ENGINE_CORE, self._shares(slow=0))

    def _shares(self, slow: int) -> Mapping[int, float]:
        return {engine.session: SLOW if i == slow else QUICK for i, engine in enumerate(self.engines)}

    def slow(self, engine: int) -> None:
        """It has the shorter turns from now on."""
        self._turns.shares = self._shares(engine)

    def end(self) -> None:
        self._turns.end()

    def look(self, gateway: Gateway) -> tuple[list[int], list[float]]:
        """Requests answered by each engine so far, and the CPU seconds it used."""
        text = get(f"{gateway.admin}/metrics").decode()
        ok = [
            line
            for line in text.splitlines()
            if line.startswith("pointsman_requests_total{") and 'status="200"' in line
        ]
        answered = [
            sum(int(float(line.rpartition(" ")[2])) for line in ok if f'endpoint="{engine.name}"' in line)
            for engine in self.engines
        ]
        return answered, [cpu_s(engine.session) for engine in self.engines]


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    affinity = os.sched_getaffinity(0)
    engines = [Engine(f"mixed-{i}", *ROOMY) for i in range(2)]
    try:
        for engine in engines:
            engine.start()
        for engine in engines:
            engine.wait()
        os.sched_setaffinity(0, {OTHER_CORE})  # ours, and what we start
        dealt = Pool(engines)
        try:
            yield dealt
        finally:
            dealt.end()
    finally:
        os.sched_setaffinity(0, affinity)
        for engine in engines:
            engine.stop()


class Run:
    """A router and its clients, while they are there."""

    def __init__(self, pool: Pool, gateway: Gateway, load: subprocess.Popen[str]) -> None:
        self._pool = pool
        self._gateway = gateway
        self._load = load

    def windows(self, count: int) -> list[Window]:
        """The next so many."""
        found = []
        (requests, cpu), at_s = self._pool.look(self._gateway), time.monotonic()
        for _ in range(count):
            at_s += WINDOW_S
            time.sleep(max(0.0, at_s - time.monotonic()))
            assert self._load.poll() is None, "the clients have ended too soon"
            later, cpu_later = self._pool.look(self._gateway)
            a, b = (y - x for x, y in zip(requests, later, strict=True))
            c, d = ((y - x) / WINDOW_S for x, y in zip(cpu, cpu_later, strict=True))
            found.append(Window((a, b), (c, d)))
            requests, cpu = later, cpu_later
        return found


@contextmanager
def running(pool: Pool, preset: str, seed: int, windows: int) -> Iterator[Run]:
    """A new router with ``preset``, under load for so many windows. Each seed has prompts of its own: no
    run finds what another left in the caches.
    """
    gateway = Gateway(*pool.engines, settings=[f"scheduling.preset={preset}"])
    command = [sys.executable, "-m", "pointsman", "bench", gateway.url, "--json", "-", "--seed", str(seed)]
    command += WORK
    command += ["--concurrency", str(CLIENTS), "--duration", str((windows + 1) * WINDOW_S)]
    load = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        yield Run(pool, gateway, load)
        told, _ = load.communicate(timeout=60)
        stage: dict[str, Any] = json.loads(told)["stages"][0]
        assert stage["ok"] == stage["requests"] > 100, stage["error_details"]
    finally:
        load.kill()
        load.wait()
        assert gateway.stop() == 0


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def test_shares_follow_the_speed_of_real_engines(pool: Pool, figures: list[str]) -> None:
    pool.slow(0)
    with running(pool, "round-robin", 1, ROUND_ROBIN_WINDOWS) as run:
        fair = run.windows(ROUND_ROBIN_WINDOWS)
    with running(pool, "least-cost", 2, BEFORE_WINDOWS + AFTER_WINDOWS) as run:
        before = run.windows(BEFORE_WINDOWS)
        pool.slow(1)
        after = run.windows(AFTER_WINDOWS)
    with running(pool, "round-robin", 3, ROUND_ROBIN_WINDOWS) as run:
        fair_after = run.windows(ROUND_ROBIN_WINDOWS)

    for title, windows in (
        ("round robin, the first one slow", fair),
        ("least-cost, from nothing", before),
        ("least-cost, from the swap on", after),
        ("round robin, the second one slow", fair_after),
    ):
        figures += [
            f"{title}: {number * WINDOW_S:2.0f} s: {window}" for number, window in enumerate(windows, 1)
        ]

    for windows in (fair, fair_after):
        share = mean([window.share(0) for window in windows[1:]])  # in the first the slow one falls behind
        assert 0.4 < share < 0.6, "round robin gives each the same"
    learned, followed = before[-2:], after[-2:]
    # By their time it would be a quarter; an engine with more sequences at once does each for less.
    assert mean([window.share(0) for window in learned]) < 0.35
    assert mean([window.share(1) for window in followed]) < 0.35
    crossed = 1 + next(i for i, window in enumerate(after) if window.share(1) < 0.5)
    figures.append(
        f"the quick one had most of the requests again {crossed * WINDOW_S:.0f} s after the swap at most"
    )
    assert crossed * WINDOW_S <= 30
    least_fair = [mean([window.per_s for window in windows[1:]]) for windows in (fair, fair_after)]
    for windows, per_s in ((learned, least_fair[0]), (followed, least_fair[1])):
        assert mean([window.per_s for window in windows]) > 1.5 * per_s
