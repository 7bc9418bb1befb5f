"""The case study's fleet behind `pointsman serve` and behind Envoy and the picker: the same load, policy and
seed, and where the requests went. ``python -m bench.placement``; exit code 1 when the places differ.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import uvloop

from pointsman.bench.client import Client, Target
from pointsman.bench.pace import Pace
from pointsman.bench.processes import ProcessFailed
from pointsman.bench.run import Bench, Load
from pointsman.bench.site import Site, site
from pointsman.bench.workloads import SharedPrefix
from pointsman.config import Envoy, Log, Picker, Scheduling, Settings
from pointsman.sim.spec import FleetFile, expand
from pointsman.twin.policies import policy
from pointsman.twin.scenario import THREE_VENDORS

ARMS: Mapping[str, tuple[str, str]] = {
    "serve": ("serve", "auto"),
    "serve, once more": ("serve", "auto"),
    "Envoy, responses unseen": ("envoy", "unseen"),
    "Envoy, responses seen": ("envoy", "seen"),
}
"""What routes, and whether responses come through the picker."""
SHARE_TOLERANCE = 0.04
"""Of all requests, for each accelerator; two runs of `serve` differ by 0.024
(docs/benchmarks/picker-placement.md).
"""
HITS_TOLERANCE = 0.02
"""Of all prompt tokens."""


class Case(msgspec.Struct, frozen=True):
    """What is sent to whom."""

    fleet: FleetFile
    prompts: SharedPrefix
    stages: tuple[Load, ...]
    """All but the last warm up."""


CASE_STUDY = Case(
    FleetFile(engines=THREE_VENDORS, tokens_per_chunk=50),
    SharedPrefix(
        groups=100,
        prompts_per_group=12,
        system_prompt_len=6000,
        question_len=1200,
        output_len=250,
        tell_max_tokens=True,
    ),
    (Load(rate=15, duration_s=12), Load(rate=25, duration_s=30)),
)


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """Where the requests of the last stage went, as the engines count them."""

    requests: int
    failed: int
    shares: Mapping[str, float]
    """Of the requests, by accelerator."""
    hit_rate: float
    """Cached prompt tokens of all, as the engines' prefix caches count."""
    ttft_p50_s: float


class Counts(msgspec.Struct, frozen=True):
    """What engines have done so far: requests by engine, and tokens in all."""

    requests: Counter[str]
    queried: float
    hit: float


def counts(at: Site) -> Counts:
    requests, queried, hit = Counter[str](), 0.0, 0.0
    for name, url in at.engines.items():
        with urllib.request.urlopen(f"{url}/metrics", timeout=10) as page:
            lines = [line.decode().rpartition(" ") for line in page if not line.startswith(b"#")]
        for metric, _, value in lines:
            if metric.startswith("vllm:request_success_total"):
                requests[name] += int(float(value))
            elif metric.startswith("vllm:prefix_cache_queries_total"):
                queried += float(value)
            elif metric.startswith("vllm:prefix_cache_hits_total"):
                hit += float(value)
    return Counts(requests, queried, hit)


async def run(arm: str, policy_name: str, seed: int, folder: Path, case: Case = CASE_STUDY) -> Placement:
    command, responses = ARMS[arm]
    settings = Settings(
        scheduling=Scheduling(preset=policy(policy_name).preset, seed=seed),
        picker=Picker(responses=responses),
        envoy=Envoy(threads=1),
        log=Log(requests=False),
    )
    pace = Pace(time.perf_counter, 1.0)
    async with site(case.fleet, settings, folder, command) as at:
        client = Client(Target(url=at.url), pace)
        try:
            await client.find_model()
            bench = Bench(client, case.prompts, pace, seed=seed)
            *before, last = case.stages
            for load in before:
                await bench.stage(load)
            start = await asyncio.to_thread(counts, at)
            await bench.stage(last)
            end = await asyncio.to_thread(counts, at)
        finally:
            await client.close()
    stage, requests = bench.stages[-1], end.requests - start.requests
    by_accelerator = Counter[str]()
    for spec in expand(case.fleet.engines):
        by_accelerator[spec.accelerator] += requests[spec.name]
    assert stage.ttft is not None, "no request was answered"
    return Placement(
        requests=stage.requests,
        failed=stage.requests - stage.ok,
        shares={name: n / requests.total() for name, n in by_accelerator.items()},
        hit_rate=(end.hit - start.hit) / (end.queried - start.queried),
        ttft_p50_s=stage.ttft.p50,
    )


def differs(found: Placement, first: Placement) -> list[str]:
    """In what a placement is not that of ``first``."""
    shares = {name: found.shares[name] - share for name, share in first.shares.items()}
    wrong = [f"{name} {by:+.1%}" for name, by in shares.items() if abs(by) > SHARE_TOLERANCE]
    if abs(found.hit_rate - first.hit_rate) > HITS_TOLERANCE:
        wrong.append(f"hit rate {found.hit_rate - first.hit_rate:+.1%}")
    if found.failed:
        wrong.append(f"{found.failed} of {found.requests} requests failed")
    return wrong


def row(policy_name: str, arm: str, found: Placement, wrong: Sequence[str]) -> str:
    shares = " | ".join(f"{share:.1%}" for share in found.shares.values())
    figures = f"{shares} | {found.hit_rate:.1%} | {found.ttft_p50_s * 1000:.0f} ms"
    return f"| {policy_name} | {arm} | {found.requests} | {figures} | {'; '.join(wrong) or 'same'} |"


async def measure(policies: Sequence[str], seed: int) -> bool:
    """Everything, one run at a time, each row as soon as it is there; whether all places are the same."""
    kinds = [item.accelerator for item in CASE_STUDY.fleet.engines]
    print(f"| policy | behind | requests | {' | '.join(kinds)} | hit rate | TTFT p50 | place |")
    print("|---" * (6 + len(kinds)) + "|", flush=True)
    same = True
    for policy_name in policies:
        first: Placement | None = None
        for arm in ARMS:
            with tempfile.TemporaryDirectory(prefix="placement-") as folder:
                found = await run(arm, policy_name, seed, Path(folder))
            first = first or found
            wrong = differs(found, first)
            same = same and not wrong
            print(row(policy_name, arm, found, wrong), flush=True)
    return same


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.placement", description=__doc__)
    parser.add_argument("--policy", action="append", help="default: least-cost and llm-d-blend")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            same = runner.run(measure(args.policy or ["least-cost", "llm-d-blend"], args.seed))
        except ProcessFailed as error:
            print(f"bench/placement: {error.message}", file=sys.stderr)
            return 2
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
