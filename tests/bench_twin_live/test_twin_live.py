"""The command end to end on a small fleet, so fast that only counts are compared."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from bench.twin_live import __main__ as command
from bench.twin_live import accounts, twin
from bench.twin_live.cases import SIX, Case, prompts

from pointsman.bench.run import Load
from pointsman.sim.spec import FleetItem
from pointsman.twin.scenario import Scenario

QUICK = Case(
    name="one",
    says="2 engines, so fast that figures may be void",
    scenario=Scenario(
        engines=(FleetItem(accelerator="h100-nvl"), FleetItem(accelerator="mi325x")),
        workload=prompts(4, 5, 40),
        stages=(Load(rate=4, duration_s=2), Load(rate=8, duration_s=5)),
    ),
    speed=5.0,
    tokens_per_chunk=8,
    policies=("round-robin",),
)


async def test_both_sides_send_the_same_requests_and_the_report_says_so(tmp_path: Path) -> None:
    (row,), counted = await command.measure([QUICK], [3], tries=1)
    simulated, live = row.twin, row.live.stage
    assert simulated.requests == live.requests == simulated.ok == live.ok == 40
    assert simulated.output_tokens == live.output_tokens == 40 * 40
    assert simulated.prompt_tokens == live.prompt_tokens == 40 * 7200
    assert simulated.endpoints == live.endpoints == {"h100-nvl": 20, "mi325x": 20}
    assert live.cached_tokens is not None
    assert live.cached_tokens > 20 * 6000
    assert live.send_s == pytest.approx(simulated.send_s, rel=0.5)
    assert set(row.live.lags) == {"fleet", "router", "load generator"}
    assert all(lag.mean_s > 0 for lag in row.live.lags.values())
    assert counted.differ == []
    code = command.finish([row], counted, tmp_path)
    assert code == {"agrees": 0, "chaotic": 0, "differs": 1, "void": command.VOID}[row.verdict]
    assert "| one | round-robin | 3 |" in (tmp_path / "report.md").read_text()
    assert len(msgspec.json.decode((tmp_path / "report.json").read_bytes())["rows"]) == 1


def test_the_accounts_meet_all_that_can_be_cached() -> None:
    found = accounts.twin(0)
    assert len(found) == accounts.REQUESTS
    late = {account.cached_tokens for account in found[50:]}
    assert late >= {0, 6000, 7184, 5888, 7168}  # nothing, a prefix, all but a block: of 16 and of 128 tokens
    assert any(0 < (cached or 0) < 5888 for cached in late)  # a prefix whose end was evicted


def test_small_delays_leave_the_requests_as_they_are() -> None:
    """Otherwise the spread would be that of other loads."""
    spread = twin.spread(SIX, "round-robin", 0)
    plain = twin.run(SIX.scenario, "round-robin", 0)
    assert spread.output_tok_s.least <= plain.output_tok_s * 1.01
    assert spread.output_tok_s.most >= plain.output_tok_s * 0.99
    assert 0 < spread.width < 0.1
