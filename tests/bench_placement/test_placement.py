"""`python -m bench.placement`: what it measures, and what it takes for the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench.placement.__main__ import HITS_TOLERANCE, SHARE_TOLERANCE, Case, Placement, differs, run
from msgspec.structs import replace

from pointsman.bench.run import Load
from pointsman.bench.workloads import SharedPrefix
from pointsman.sim.spec import FleetFile, FleetItem

FOUND = Placement(
    requests=100, failed=0, shares={"h100-nvl": 0.6, "gaudi3": 0.4}, hit_rate=0.8, ttft_p50_s=0.1
)
SMALL = Case(
    FleetFile(
        engines=(FleetItem(accelerator="h100-nvl", count=1), FleetItem(accelerator="mi325x", count=1)),
        tokens_per_chunk=5,
    ),
    SharedPrefix(
        groups=2,
        prompts_per_group=10,
        system_prompt_len=600,
        question_len=16,
        output_len=5,
        tell_max_tokens=True,
    ),
    (Load(rate=20, duration_s=0.5), Load(rate=20, duration_s=0.5)),
)


@pytest.mark.parametrize("arm", ["serve", "Envoy, responses unseen"])
async def test_engines_tell_where_requests_went_whatever_routes(arm: str, tmp_path: Path) -> None:
    found = await run(arm, "round-robin", 1, tmp_path, SMALL)
    assert (found.requests, found.failed) == (10, 0)
    assert found.shares == {"h100-nvl": 0.5, "mi325x": 0.5}
    assert 0.5 < found.hit_rate < 1
    assert found.ttft_p50_s > 0


def test_a_placement_is_the_same_within_its_tolerances_and_without_failures() -> None:
    by = SHARE_TOLERANCE + 0.01
    moved = replace(FOUND, shares={"h100-nvl": 0.6 - by, "gaudi3": 0.4 + by})
    assert differs(FOUND, FOUND) == []
    assert differs(moved, FOUND) == ["h100-nvl -5.0%", "gaudi3 +5.0%"]
    assert differs(replace(FOUND, hit_rate=0.8 - HITS_TOLERANCE - 0.01), FOUND) == ["hit rate -3.0%"]
    assert differs(replace(FOUND, failed=1), FOUND) == ["1 of 100 requests failed"]
