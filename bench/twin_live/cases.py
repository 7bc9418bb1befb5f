"""What is run twice: in the twin, and over HTTP."""

from __future__ import annotations

import msgspec

from pointsman.bench.run import Load
from pointsman.bench.workloads import SharedPrefix
from pointsman.sim.spec import FleetItem
from pointsman.twin.scenario import THREE_VENDORS, Scenario

POLICIES = ("round-robin", "llm-d-blend", "llm-d-affinity", "least-cost")


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """A scenario and the pace at which it happens over HTTP. All stages but the last warm up."""

    name: str
    says: str
    scenario: Scenario
    speed: float = 1.0
    """Engine seconds in one of ours."""
    tokens_per_chunk: int = 50
    policies: tuple[str, ...] = POLICIES


def prompts(groups: int, each: int, output_len: int) -> SharedPrefix:
    """The case study's prompts. Requests over HTTP say how long their answers will be, so the twin's do."""
    return SharedPrefix(
        groups=groups,
        prompts_per_group=each,
        system_prompt_len=6000,
        question_len=1200,
        output_len=output_len,
        tell_max_tokens=True,
    )


ONE = Case(
    name="one",
    says="1 H100-NVL, 4 requests/s",
    scenario=Scenario(
        engines=(FleetItem(accelerator="h100-nvl", count=1),),
        workload=prompts(12, 15, 250),
        stages=(Load(rate=2, duration_s=12), Load(rate=4, duration_s=30)),
    ),
    policies=("round-robin",),
)
SIX = Case(
    name="six",
    says="2 H100-NVL, 2 MI325X, 2 Gaudi3, 10 requests/s",
    scenario=Scenario(
        engines=tuple(FleetItem(accelerator=item.accelerator, count=2) for item in THREE_VENDORS),
        workload=prompts(30, 15, 250),
        stages=(Load(rate=6, duration_s=10), Load(rate=10, duration_s=30)),
    ),
)
TWENTY = Case(
    name="twenty",
    says="4 H100-NVL, 8 MI325X, 8 Gaudi3, 25 requests/s",
    scenario=Scenario(
        workload=prompts(100, 12, 250),
        stages=(Load(rate=15, duration_s=12), Load(rate=25, duration_s=30)),
    ),
)
OVERLOAD = Case(
    name="overload",
    says="4 H100-NVL, 8 MI325X, 8 Gaudi3, the case study's 85 requests/s for 15 s",
    scenario=Scenario(
        workload=prompts(150, 5, 1000),
        stages=(Load(rate=15, duration_s=20), Load(rate=85, duration_s=15)),
    ),
)
CASES = {case.name: case for case in (ONE, SIX, TWENTY, OVERLOAD)}
DEFAULT = ("one", "six", "twenty")
