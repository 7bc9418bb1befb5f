"""What was learned survives a restart: what comes back, what does not, and what the file says."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman.predictor.fit import HALF_LIFE_S
from pointsman.predictor.lengths import Lengths
from pointsman.predictor.speed import Speeds
from pointsman.predictor.state import Kept, State, StateError, decode, encode
from pointsman.testing import fleet, request
from pointsman.types import Endpoint

STEPS_S = (0.05, 0.05, 0.1, 0.01)
"""Seconds of a step at the endpoints that were learned: two kinds, one of the first throttled."""
KV = (1000, 1000, 1000, 5000)
NOW_S = 50_000.0
"""On the clock of the later process."""


def pool(kv: Sequence[int] = KV, **columns: Sequence[object]) -> list[Endpoint]:
    n = len(kv)
    alike = {"requests": [10] * n, "engine": ["vllm"] * n, "models": [frozenset({"m"})] * n}
    return fleet(kv_blocks=kv, block_tokens=[16] * n, **alike | columns)


def learn(
    speeds: Speeds, endpoints: Sequence[Endpoint], steps_s: Sequence[float], since_s: float = 0.0
) -> float:
    """A minute of streams; returns when it ends."""
    for tick in range(240):
        speeds.refresh(endpoints, since_s + tick * 0.25, [10_000.0] * len(endpoints))
        for endpoint, step_s in zip(endpoints, steps_s, strict=True):
            endpoint.load.received_bytes += round(10 * 0.25 / step_s * 220)
    return since_s + 60.0


def learned() -> State:
    speeds, endpoints = Speeds(), pool()
    now_s = learn(speeds, endpoints, STEPS_S)
    state = speeds.state(endpoints, now_s)
    assert state is not None
    return State(1e9, Kept(state))


def again(state: State, endpoints: Sequence[Endpoint], passed_s: float = 0.0) -> Speeds:
    """A later process that has looked at its endpoints once, and seen nothing yet."""
    speeds = Speeds()
    speeds.restore(decode(encode(state)).kept.speeds, NOW_S - passed_s, NOW_S)
    speeds.refresh(endpoints, NOW_S, [10_000.0] * len(endpoints))
    return speeds


def steps(speeds: Speeds) -> list[float]:
    return [speeds.by_slot[slot].step_s(10, 10_000) for slot in sorted(speeds.by_slot)]


def test_speeds_come_back_as_they_were() -> None:
    before, endpoints = Speeds(), pool()
    now_s = learn(before, endpoints, STEPS_S)
    assert steps(before) == pytest.approx(STEPS_S, rel=0.2)
    state = before.state(endpoints, now_s)
    assert state is not None
    after = again(State(1e9, Kept(state)), pool())
    assert steps(after) == pytest.approx(steps(before), rel=1e-3)
    for slot in range(len(KV)):
        assert after.token_s(slot) == pytest.approx(before.token_s(slot), rel=1e-3)
        assert after.by_slot[slot].kind.fit.weight_s == pytest.approx(
            before.by_slot[slot].kind.fit.weight_s, rel=0.01
        )


def test_confidence_ages_with_the_time_that_has_passed() -> None:
    state = learned()
    now, later = again(state, pool()), again(state, pool(), passed_s=HALF_LIFE_S)
    for slot in range(len(KV)):
        weight_s = now.by_slot[slot].kind.fit.weight_s
        assert later.by_slot[slot].kind.fit.weight_s == pytest.approx(weight_s / 2, rel=0.01)
    assert steps(later)[0] == pytest.approx(STEPS_S[0], rel=0.25)
    assert later.by_slot[2].scale < 1.05 < 1.4 < now.by_slot[2].scale, "it may not be throttled any more"
    long_ago = again(state, pool(), passed_s=86_400.0)
    assert max(long_ago.by_slot[slot].kind.fit.weight_s for slot in range(len(KV))) < 1e-6
    assert len({round(s, 4) for s in steps(long_ago)}) == 1


@pytest.mark.parametrize(
    "columns",
    [
        {"kv_blocks": [500, 500, 500, 9000]},
        {"engine": ["sglang"] * 4},
        {"models": [frozenset({"another"})] * 4},
        {"block_tokens": [32] * 4},
    ],
    ids=lambda columns: next(iter(columns)),
)
def test_an_endpoint_that_is_not_what_it_was_is_learned_anew(columns: dict[str, Sequence[object]]) -> None:
    base = {"requests": [10] * 4, "engine": ["vllm"] * 4, "models": [frozenset({"m"})] * 4}
    changed = fleet(**{"kv_blocks": KV, "block_tokens": [16] * 4} | base | columns)
    speeds = again(learned(), changed)
    assert [speeds.by_slot[slot].kind.fit.weight_s for slot in range(4)] == [0.0] * 4
    assert [speeds.by_slot[slot].scale for slot in range(4)] == [1.0] * 4


def test_a_new_endpoint_of_a_known_kind_is_believed_to_be_like_it() -> None:
    (new,) = pool(kv=(5000,), name=["new"])
    assert steps(again(learned(), [new])) == pytest.approx([0.01], rel=0.25)
    (with_adapter,) = pool(kv=(5000,), name=["new"], models=[frozenset({"m", "adapter"})])
    assert steps(again(learned(), [with_adapter])) == pytest.approx([0.01], rel=0.25)


def test_where_the_kv_size_is_not_told_an_endpoint_is_known_by_name_only() -> None:
    speeds, endpoints = Speeds(), pool(kv=(0, 0))
    now_s = learn(speeds, endpoints, (0.05, 0.01))
    state = speeds.state(endpoints, now_s)
    assert state is not None
    kept = State(1e9, Kept(state))
    swapped = pool(kv=(0, 0, 0), name=["e1", "e0", "new"])
    fast, slow, new = steps(again(kept, swapped))
    assert (fast, slow) == pytest.approx((0.01, 0.05), rel=0.25)
    assert new not in (pytest.approx(fast), pytest.approx(slow))


def test_what_has_not_been_seen_since_a_restart_survives_the_next_one() -> None:
    speeds = Speeds()
    speeds.restore(learned().kept.speeds, NOW_S, NOW_S)
    unused = speeds.state([], NOW_S)
    assert unused is not None
    speeds = again(State(1e9, Kept(unused)), pool())
    assert steps(speeds) == pytest.approx(STEPS_S, rel=0.25)
    only_one = again(learned(), pool(kv=(5000,), name=["e3"]))
    second = only_one.state(pool(kv=(5000,), name=["e3"]), NOW_S + HALF_LIFE_S)
    assert second is not None
    assert sorted(kind.kv_blocks for kind in second.kinds) == [1000, 5000]
    after_an_hour = only_one.state([], NOW_S + 24 * HALF_LIFE_S)
    assert after_an_hour is not None
    assert after_an_hour.kinds == (), "what nobody has seen for long is forgotten"


def test_lengths_come_back_as_they_were() -> None:
    before = Lengths()
    kinds = [
        request("You classify. " * 30, max_tokens=64),
        request("You reason. " * 30, max_tokens=8000),
        request(headers={"x-llm-d-inference-fairness-id": "tenant"}, max_tokens=8000),
        request(model="other"),
    ]
    for i in range(400):
        for made, tokens in zip(kinds, (5, 3000, 700, 90), strict=True):
            before.add(made, tokens + i % 10)
        before.left(kinds[1], 1000)
    after = Lengths()
    after.restore(decode(encode(State(1e9, Kept(learned().kept.speeds, before.state())))).kept.lengths, 0.0)
    for made in [*kinds, request(model="m", max_tokens=9000), request(model="unheard")]:
        was, now = before.of(made), after.of(made)
        assert now.mean == pytest.approx(was.mean, rel=0.05)
        assert now.quantile(0.9) == pytest.approx(was.quantile(0.9), rel=0.05)
    later = Lengths()
    later.restore(before.state(), 10 * 86_400.0)
    assert later.pool.weight == pytest.approx(before.pool.weight / 1024, rel=0.01)


def test_the_file_is_small_and_says_nothing_of_clients() -> None:
    speeds, lengths = Speeds(), Lengths()
    endpoints = pool(kv=[1000 * 2 ** (i % 4) for i in range(1000)])
    for tick in range(4):
        speeds.refresh(endpoints, tick * 0.25, [10_000.0] * 1000)
        for endpoint in endpoints:
            endpoint.load.received_bytes += 11_000
    for i in range(2000):
        secret = {"x-llm-d-inference-fairness-id": f"secret-{i % 300}"}
        lengths.add(
            request(f"secret {i}", model="secret-model", headers=secret, max_tokens=2 ** (i % 15)),
            3 ** (i % 9),
        )
    speeds_state = speeds.state(endpoints, 1.0)
    assert speeds_state is not None
    assert len(speeds_state.endpoints) == 1000
    data = encode(State(1e9, Kept(speeds_state, lengths.state())))
    assert len(data) < 100_000
    assert b"secret" not in data


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "not a file of what was learned"),
        (b"\x00\xff" * 100, "not a file of what was learned"),
        (b'{"endpoints": []}', "not a file of what was learned"),
        (b'{"format": "another", "version": 1, "xxh3": ""}\n{}\n', "not a file of what was learned"),
        (b'{"format": "pointsman learned", "version": 9, "xxh3": ""}\n{}\n', "is of version 9"),
        (b'{"format": "pointsman learned", "version": 1, "xxh3": ""}\n{}\n', "is damaged"),
    ],
)
def test_what_cannot_be_read_says_why(data: bytes, why: str) -> None:
    with pytest.raises(StateError, match=why):
        decode(data)


GOOD = encode(learned())


@given(st.integers(0, len(GOOD) - 2), st.integers(1, 255))
def test_a_changed_byte_is_noticed(at: int, flip: int) -> None:
    changed = GOOD[:at] + bytes((GOOD[at] ^ flip,)) + GOOD[at + 1 :]
    with pytest.raises(StateError):
        decode(changed)


@given(st.integers(0, len(GOOD) - 2))
def test_a_file_that_was_cut_is_noticed(at: int) -> None:
    with pytest.raises(StateError):
        decode(GOOD[:at])
