"""Where prompts belong, for routers that do not talk to each other."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from pointsman.prefix.hashing import chains_of
from pointsman.scheduling.homes import FEW, MOST_KEYS, RENEW_S, Homes, key_of
from pointsman.testing import request, services


def names(n: int) -> list[str]:
    return [f"e{i}" for i in range(n)]


def test_shares_of_first_homes_are_those_of_the_capacities() -> None:
    rng, homes = random.Random(1), Homes()
    firsts = [
        homes.of(rng.getrandbits(64), names(4), [1.0, 2.0, 3.0, 4.0], set(), 0.0)[0] for _ in range(4000)
    ]
    for i in range(4):
        assert firsts.count(i) / len(firsts) == pytest.approx((i + 1) / 10, rel=0.1)


def test_a_capacity_that_changes_a_little_moves_few_prompts() -> None:
    rng, homes, all_ = random.Random(2), Homes(), names(20)
    keys = [rng.getrandbits(64) for _ in range(1000)]
    before = [homes.of(key, all_, [100.0] * 20, set(), 0.0) for key in keys]
    after = [homes.of(key, all_, [100.0 + i % 3 for i in range(20)], set(), 0.0) for key in keys]
    assert all(len(set(found)) == 2 for found in before)
    assert 0 < sum(a != b for a, b in zip(before, after, strict=True)) < 50


def test_what_is_remembered_is_what_would_be_found_anew() -> None:
    rng, homes, all_ = random.Random(3), Homes(), names(200)
    assert len(all_) > 2 * FEW
    keys = [rng.getrandbits(64) for _ in range(100)]
    capacities = [100.0] * 200
    for _ in range(5):
        for key in keys:
            assert homes.of(key, all_, capacities, set(), 0.0) == Homes().of(
                key, all_, capacities, set(), 0.0
            )
        capacities = [c * rng.uniform(0.9, 1.1) for c in capacities]


def test_who_is_closed_is_nobodys_home_and_the_next_is() -> None:
    homes, all_, capacities = Homes(), names(40), [1.0] * 40
    ranked: list[int] = []
    while len(ranked) < 40:
        ranked.append(homes.of(7, all_, capacities, set(ranked), 0.0)[0])
    assert sorted(ranked) == list(range(40))
    for i, (first, second) in enumerate(pairwise(ranked)):
        assert homes.of(7, all_, capacities, set(ranked[:i]), 0.0) == [first, second]
    assert homes.of(7, all_, capacities, set(ranked[:-1]), 0.0) == ranked[-1:]


def test_who_joins_gets_its_share_of_prompts_that_were_seen_before() -> None:
    rng, homes = random.Random(4), Homes()
    keys = [rng.getrandbits(64) for _ in range(1000)]
    before = [homes.of(key, names(19), [1.0] * 19, set(), 0.0)[0] for key in keys]
    after = [homes.of(key, names(20), [1.0] * 20, set(), 0.0)[0] for key in keys]
    moved = [b for a, b in zip(before, after, strict=True) if a != b]
    assert set(moved) == {19}
    assert len(moved) == pytest.approx(50, rel=0.4)


def test_capacities_that_changed_a_lot_count_after_a_while() -> None:
    homes, all_ = Homes(), names(100)
    grown = [1.0] * 99 + [1e6]
    homes.of(5, all_, [1.0] * 100, {99}, 0.0)
    assert homes.of(5, all_, grown, set(), RENEW_S)[0] == 99


def test_no_more_prompts_are_remembered_than_said() -> None:
    homes = Homes()
    for key in range(MOST_KEYS + 10):
        homes.of(key, names(3), [1.0] * 3, set(), 0.0)
    assert len(homes._known) == MOST_KEYS


def test_prompts_that_begin_alike_belong_together_and_others_do_not() -> None:
    index = services().prefix
    rng = random.Random(3)

    def key(text: str) -> int:
        return key_of(chains_of(request(text), index._ends)[0])

    prefixes = ["".join(rng.choices("abcdef ", k=24_000)) for _ in range(5)]
    keys = [{key(prefix + "".join(rng.choices("xyz", k=4_800))) for _ in range(4)} for prefix in prefixes]
    assert all(len(of_it) == 1 for of_it in keys)
    assert len(set.union(*keys)) == 5
