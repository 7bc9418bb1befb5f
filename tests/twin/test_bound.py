"""The fluid bound against the figures published with the case study, and its laws."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from pointsman.sim.profiles import GRANITE, PARAMETERS, EngineParameters
from pointsman.twin.bound import Demand, fluid_bound

THREE_VENDORS = [
    (PARAMETERS["h100-nvl", GRANITE], 4),
    (PARAMETERS["mi325x", GRANITE], 8),
    (PARAMETERS["gaudi3", GRANITE], 8),
]
PLAIN = EngineParameters(
    base_s=0.01,
    sequence_s=0.0,
    context_token_s=0.0,
    prefill_tokens_per_s=1.0,
    prefill_step_s=0.0,
    kv_tokens=10_000,
    max_sequences=1000,
    block_tokens=10,
)
"""Steps of 10 ms whatever the batch."""


def study(rate: float, groups: int = 150) -> Demand:
    return Demand(
        rate=rate, duration_s=30, prompt_tokens=7545, output_tokens=1000, prefix_tokens=6000, groups=groups
    )


@pytest.mark.parametrize(
    ("rate", "published"),
    [(25, 16533), (40, 21102), (55, 23604), (70, 25108), (85, 26141), (100, 26899), (120, 27566)],
)
def test_the_three_vendor_pool_gives_the_published_bound(rate: int, published: int) -> None:
    found = fluid_bound(THREE_VENDORS, study(rate), kv=False)
    assert found.output_tok_s == pytest.approx(published, rel=0.01)


def test_endpoints_share_all_requests_and_the_fast_ones_get_more() -> None:
    found = fluid_bound(THREE_VENDORS, study(85), kv=True)
    h100, mi325x, gaudi3 = found.shares
    assert 4 * h100 + 8 * mi325x + 8 * gaudi3 == pytest.approx(1, rel=1e-3)
    assert mi325x > h100 > 2 * gaudi3
    assert found.output_tok_s * found.makespan_s == pytest.approx(85 * 30 * 1000)


def test_one_endpoint_of_equal_steps_ends_when_the_last_request_has_had_them() -> None:
    demand = Demand(rate=2, duration_s=10, prompt_tokens=100, output_tokens=50, prefix_tokens=100)
    found = fluid_bound([(PLAIN, 1)], demand, kv=False)
    assert found.makespan_s == pytest.approx(9.75 + 50 * 0.01, abs=0.02)


def test_kv_binds_where_prefixes_and_private_tokens_do_not_fit() -> None:
    """4,000 of 10,000 tokens are prefixes, a request of 1 s holds 50 and at its end 150 of the others."""
    demand = Demand(
        rate=100, duration_s=2, prompt_tokens=1050, output_tokens=100, prefix_tokens=1000, groups=4
    )
    free = fluid_bound([(PLAIN, 1)], demand, kv=False)
    held = fluid_bound([(PLAIN, 1)], demand, kv=True)
    assert free.makespan_s == pytest.approx(3, abs=0.05)
    assert 200 * 100 / 6000 < held.makespan_s < 200 * 150 / 6000


def test_a_prefix_has_to_live_only_once() -> None:
    """Ten groups do not fit one endpoint, but two endpoints hold five each."""
    demand = Demand(
        rate=10, duration_s=10, prompt_tokens=1550, output_tokens=10, prefix_tokens=1500, groups=10
    )
    assert math.isinf(fluid_bound_makespan(1, demand))
    assert fluid_bound_makespan(2, demand) == pytest.approx(10, rel=0.05)


def fluid_bound_makespan(count: int, demand: Demand) -> float:
    return fluid_bound([(PLAIN, count)], demand, kv=True).makespan_s


def test_prefill_speed_and_what_lies_beyond_the_prompt_do_not_matter() -> None:
    slow = structs.replace(PLAIN, prefill_tokens_per_s=1e-3)
    assert fluid_bound([(slow, 2)], study(5), kv=False) == fluid_bound([(PLAIN, 2)], study(5), kv=False)


@settings(max_examples=10, deadline=None)
@given(
    rate=st.floats(1, 60),
    more=st.floats(1.1, 3),
    groups=st.integers(1, 60),
    count=st.integers(1, 6),
)
def test_more_endpoints_never_take_longer_and_kv_never_helps(
    rate: float, more: float, groups: int, count: int
) -> None:
    kind = PARAMETERS["h100-nvl", GRANITE]
    small, large = study(rate, groups), study(rate * more, groups)
    free, kv = (fluid_bound([(kind, count)], small, kv=kv) for kv in (False, True))
    assert kv.makespan_s >= free.makespan_s * 0.999
    assert fluid_bound([(kind, count + 1)], small, kv=False).makespan_s <= free.makespan_s * 1.001
    assert fluid_bound([(kind, count)], large, kv=False).makespan_s >= free.makespan_s * 0.98
