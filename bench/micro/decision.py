"""Time of one warm scheduling decision: hash, match, filter, score, pick, record, index. No request parsing.

``python bench/micro/decision.py`` prints, per preset and pool size, median and 99th percentile of
``Scheduler.schedule`` for a 32 KB prompt. Warm: one endpoint holds the prompt. Shared: and all hold half of
it. Cold: every prompt is new.
"""

from __future__ import annotations

import argparse
import platform
import random
import time
from pathlib import Path

from pointsman.prefix.approximate import PrefixIndex
from pointsman.scheduling.cycle import Services
from pointsman.scheduling.presets import build_scheduler, load_policy
from pointsman.types import Endpoint, InferenceRequest, Load, Metrics, Prompt

PRESETS = ("least-cost", "llm-d-affinity", "llm-d-blend", "least-request")
POOLS = (20, 200, 1000)
PROMPT_BYTES = 32 * 1024


def machine() -> str:
    """Processor and Python, in a line."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor()}, Python {platform.python_version()}"


def pool(n: int, rng: random.Random) -> tuple[Endpoint, ...]:
    """``n`` endpoints with some load, all different."""
    endpoints = []
    for slot in range(n):
        load = Load()
        load.requests, load.tokens = rng.randrange(50), rng.randrange(50_000)
        metrics = Metrics(
            at_s=1.0, waiting=rng.randrange(5), running=rng.randrange(60), kv_usage=rng.random()
        )
        endpoints.append(
            Endpoint(name=f"endpoint-{slot}", slot=slot, address="10.0.0.1:8000", load=load, metrics=metrics)
        )
    return tuple(endpoints)


def request(i: int, text: bytes) -> InferenceRequest:
    tokens = len(text) // 4
    prompts = (Prompt(text, tokens),)
    return InferenceRequest(
        id=str(i), path="/v1/completions", format="openai", model="m", prompts=prompts, prompt_tokens=tokens
    )


def measure(preset: str, n: int, rounds: int, prompts: str) -> list[float]:
    """Microseconds of each of ``rounds`` decisions, sorted."""
    rng = random.Random(1)
    services = Services(PrefixIndex(), time.monotonic, rng)
    scheduler = build_scheduler(load_policy(preset), services)
    endpoints = pool(n, rng)
    for endpoint in endpoints:
        services.prefix.add(endpoint.slot)
    half = rng.randbytes(PROMPT_BYTES // 2) if prompts == "shared" else b""
    distinct = rounds + 100 if prompts == "cold" else 8
    texts = [half + rng.randbytes(PROMPT_BYTES - len(half)) for _ in range(distinct)]
    requests = [request(i, texts[i % distinct]) for i in range(rounds + 100)]
    if half:
        chains = services.prefix.match(request(0, half)).chains
        for endpoint in endpoints:
            services.prefix.insert(endpoint.slot, chains)
    took = []
    for one in requests:
        begin = time.perf_counter_ns()
        scheduler.schedule(one, endpoints)
        took.append((time.perf_counter_ns() - begin) / 1000)
    return sorted(took[100:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3000, help="decisions measured per line")
    rounds = parser.parse_args().rounds
    print(f"{machine()}; {PROMPT_BYTES // 1024} KB prompt, {rounds} decisions a line, microseconds")
    print(f"{'preset':<16}{'endpoints':>10}{'prompt':>8}{'median':>9}{'p99':>9}")
    for preset in PRESETS:
        for n in POOLS:
            for prompts in ("warm", "shared", "cold"):
                took = measure(preset, n, rounds, prompts)
                median, p99 = took[len(took) // 2], took[len(took) * 99 // 100]
                print(f"{preset:<16}{n:>10}{prompts:>8}{median:>9.1f}{p99:>9.1f}")


if __name__ == "__main__":
    main()
