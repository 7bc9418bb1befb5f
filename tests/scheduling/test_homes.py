"""Where prompts belong, for routers that do not talk to each other."""

from __future__ import annotations

import random

import pytest

from pointsman.prefix.hashing import chains_of
from pointsman.scheduling.homes import homes, key_of
from pointsman.testing import fleet, request, services


def test_shares_of_first_homes_are_those_of_the_capacities() -> None:
    endpoints, rng = fleet(4), random.Random(1)
    firsts = [homes(rng.getrandbits(64), endpoints, [1.0, 2.0, 3.0, 4.0], 2)[0] for _ in range(4000)]
    for i in range(4):
        assert firsts.count(i) / len(firsts) == pytest.approx((i + 1) / 10, rel=0.1)


def test_a_capacity_that_changes_a_little_moves_few_prompts() -> None:
    endpoints, rng = fleet(20), random.Random(2)
    keys = [rng.getrandbits(64) for _ in range(1000)]
    before = [homes(key, endpoints, [100.0] * 20, 2) for key in keys]
    after = [homes(key, endpoints, [100.0 + i % 3 for i in range(20)], 2) for key in keys]
    assert all(len(set(found)) == 2 for found in before)
    assert sum(a != b for a, b in zip(before, after, strict=True)) < 50


def test_prompts_that_begin_alike_belong_together_and_others_do_not() -> None:
    index = services().prefix
    rng = random.Random(3)

    def key(text: str) -> int:
        return key_of(chains_of(request(text), index._ends)[0])

    prefixes = ["".join(rng.choices("abcdef ", k=24_000)) for _ in range(5)]
    keys = [{key(prefix + "".join(rng.choices("xyz", k=4_800))) for _ in range(4)} for prefix in prefixes]
    assert all(len(of_it) == 1 for of_it in keys)
    assert len(set.union(*keys)) == 5
