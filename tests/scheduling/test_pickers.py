"""Whom each picker picks, and how often."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from math import ceil
from typing import Any

import pytest

from pointsman.errors import SettingsError
from pointsman.registry import build
from pointsman.scheduling.cycle import Cycle
from pointsman.testing import cycle, fleet, request, services
from pointsman.types import Endpoint

TRIES = 6000


def picker(name: str, **parameters: Any) -> Any:
    return build(name, parameters, "test")


def shares(plugin: Any, pool: Sequence[Endpoint], scores: Sequence[float]) -> dict[str, float]:
    """How often each endpoint comes first."""
    given = services(seed=1)
    asked = cycle(pool, given=given)
    counts = Counter(plugin.pick(asked, scores)[0].name for _ in range(TRIES))
    return {e.name: counts[e.name] / TRIES for e in pool}


def about(*values: float) -> Any:
    return pytest.approx({f"e{i}": value for i, value in enumerate(values)}, abs=0.03)


def test_max_score_picks_the_best_and_spreads_ties() -> None:
    assert shares(picker("max-score-picker"), fleet(3), [0.1, 0.9, 0.3]) == about(0, 1, 0)
    assert shares(picker("max-score-picker"), fleet(4), [0.9, 0.1, 0.9, 0.9]) == about(1 / 3, 0, 1 / 3, 1 / 3)


def test_max_score_orders_its_fallbacks_and_spreads_their_ties() -> None:
    plugin = picker("max-score-picker", maxNumOfEndpoints=3)
    asked = cycle(fleet(4))
    assert [e.name for e in plugin.pick(asked, [0.1, 0.9, 0.3, 0.2])] == ["e1", "e2", "e3"]
    assert shares(plugin, fleet(2), [0.5, 0.5]) == about(0.5, 0.5)
    assert len(plugin.pick(cycle(fleet(2)), [0, 0])) == 2


def test_random_ignores_scores() -> None:
    assert shares(picker("random-picker"), fleet(4), [0, 0, 0, 1]) == about(0.25, 0.25, 0.25, 0.25)


@pytest.mark.parametrize("k", [1, 2])
def test_weighted_random_picks_in_proportion_to_the_score(k: int) -> None:
    plugin = picker("weighted-random-picker", maxNumOfEndpoints=k)
    assert shares(plugin, fleet(4), [1, 2, 0, 5]) == about(1 / 8, 2 / 8, 0, 5 / 8)
    assert shares(plugin, fleet(2), [0, 0]) == about(0.5, 0.5)


def test_weighted_random_puts_endpoints_without_a_score_last() -> None:
    plugin = picker("weighted-random-picker", maxNumOfEndpoints=2)
    asked = cycle(fleet(3))
    for _ in range(50):
        assert {e.name for e in plugin.pick(asked, [0.5, 0, 0.5])} == {"e0", "e2"}


def test_round_robin_is_smooth() -> None:
    plugin = picker("round-robin-picker")
    asked = cycle(fleet(weight=[5.0, 1.0, 1.0]))
    turns = [plugin.pick(asked, [])[0].name for _ in range(7)]
    assert turns == ["e0", "e0", "e1", "e0", "e2", "e0", "e0"]


def test_round_robin_gives_exact_shares_to_a_changing_pool_and_forgets_who_left() -> None:
    plugin = picker("round-robin-picker")
    for generation in range(50):
        pool = fleet(name=[f"g{generation}-{i}" for i in range(10)], weight=[1.0] * 9 + [2.0])
        asked = cycle(pool)
        counts = Counter(plugin.pick(asked, [])[0].name for _ in range(110))
        assert [counts[e.name] for e in pool] == [10] * 9 + [20]
    assert len(plugin._credit) < 100


def test_power_of_two_takes_the_less_loaded_of_two() -> None:
    pool = fleet(requests=[0, 5, 9], weight=[1.0, 1.0, 1.0])
    assert shares(picker("power-of-two-picker"), pool, []) == about(2 / 3, 1 / 3, 0)
    heavy = fleet(requests=[3, 5], weight=[1.0, 2.0])
    assert shares(picker("power-of-two-picker"), heavy, []) == about(0, 1)
    assert shares(picker("power-of-two-picker"), fleet(1), []) == about(1)


def keys(n: int) -> list[str]:
    rng = random.Random(3)
    return [rng.randbytes(40).hex() for _ in range(n)]


def homes(plugin: Any, pool: Sequence[Endpoint], prompts: Sequence[str]) -> list[str]:
    given = services()
    return [plugin.pick(cycle(pool, text, given=given), [])[0].name for text in prompts]


def test_consistent_hash_spreads_prompts_by_weight() -> None:
    counts = Counter(homes(picker("consistent-hash-picker"), fleet(weight=[1.0, 1.0, 2.0]), keys(4000)))
    assert {name: n / 4000 for name, n in counts.items()} == about(0.25, 0.25, 0.5)


def test_consistent_hash_moves_only_the_keys_of_who_left() -> None:
    plugin, pool, prompts = picker("consistent-hash-picker"), fleet(5), keys(500)
    before = homes(plugin, pool, prompts)
    after = homes(plugin, pool[:2] + pool[3:], prompts)
    moved = [(b, a) for b, a in zip(before, after, strict=True) if a != b]
    assert moved
    assert {b for b, _ in moved} == {"e2"}
    assert homes(plugin, pool, prompts) == before


def test_consistent_hash_goes_by_session_then_first_block() -> None:
    plugin, pool = picker("consistent-hash-picker"), fleet(20)
    block = "x" * 1024
    assert len({plugin.pick(cycle(pool, block + text), [])[0].name for text in keys(20)}) == 1
    session = {"x-session-id": "s"}
    assert len({plugin.pick(cycle(pool, text, headers=session), [])[0].name for text in keys(20)}) == 1


def test_consistent_hash_without_a_key_takes_the_least_loaded() -> None:
    pool = fleet(requests=[3, 1, 1, 8], weight=[1.0, 1.0, 1.0, 9.0])
    assert shares(picker("consistent-hash-picker"), pool, []) == about(0, 0, 0, 1)
    assert shares(picker("consistent-hash-picker"), pool[:3], []) == about(0, 0.5, 0.5)


def test_bounded_hash_fills_no_endpoint_above_its_share() -> None:
    plugin, pool = picker("consistent-hash-picker", loadFactor=1.05), fleet(weight=[1.0, 1.0, 2.0])
    for sent in range(1, 401):
        chosen = plugin.pick(cycle(pool, "one hot prompt" * 100), [])[0]
        chosen.load.requests += 1
        assert chosen.load.requests <= ceil(1.05 * sent * chosen.weight / 4)
    full = [n for n in (e.load.requests for e in pool) if n in (105, 210)]
    assert len(full) == 2, "the first two endpoints of the key are full, the third has the rest"


def test_bounded_hash_stays_at_home_while_there_is_room() -> None:
    plain, bounded = picker("consistent-hash-picker"), picker("consistent-hash-picker", loadFactor=1.25)
    pool, prompts = fleet(requests=[10] * 5), keys(50)
    assert homes(bounded, pool, prompts) == homes(plain, pool, prompts)
    pool[2].load.requests = 16
    at_home, moved = homes(plain, pool, prompts), homes(bounded, pool, prompts)
    changed = {before for before, after in zip(at_home, moved, strict=True) if before != after}
    assert changed == {"e2"}
    assert "e2" not in moved


def test_bounded_hash_needs_room_for_every_request() -> None:
    with pytest.raises(SettingsError, match="loadFactor: 0, or at least 1"):
        picker("consistent-hash-picker", loadFactor=0.9)


BLOCK = 4 * 64 * 4
"""The prefix index's first block, in bytes; multiples of it end on later blocks, too."""


def holding(blocks: list[int], text: str, **columns: Any) -> Cycle:
    """A cycle for ``text`` in which endpoint i holds its first ``blocks[i]`` blocks."""
    given = services(block_tokens=64)
    asked = cycle(fleet(len(blocks), **columns), text, given=given)
    for slot, n in enumerate(blocks):
        given.prefix.insert(slot, given.prefix.match(request(text[: n * BLOCK])).chains)
    asked.match = given.prefix.match(asked.request)
    return asked


def test_cache_aware_goes_where_most_of_the_prompt_is_cached() -> None:
    plugin = picker("cache-aware-picker")
    assert [e.name for e in plugin.pick(holding([0, 3, 2, 1], "x" * BLOCK * 4), [])] == ["e1"]


@pytest.mark.parametrize(("threshold", "chosen"), [(0.49, "e1"), (0.5, "e0")])
def test_cache_aware_goes_to_the_smallest_tree_when_little_is_cached(threshold: float, chosen: str) -> None:
    asked = holding([0, 2, 1], "x" * BLOCK * 4, requests=[30, 0, 0])
    assert picker("cache-aware-picker", cacheThreshold=threshold).pick(asked, [])[0].name == chosen


@pytest.mark.parametrize(
    ("requests", "chosen"), [([3, 35, 3], "e1"), ([2, 35, 3], "e0"), ([200, 300, 300], "e0")]
)
def test_cache_aware_goes_to_the_least_loaded_while_loads_are_apart(requests: list[int], chosen: str) -> None:
    asked = holding([0, 4, 0], "x" * BLOCK * 4, requests=requests)
    assert picker("cache-aware-picker").pick(asked, [])[0].name == chosen


def test_cache_aware_needs_both_thresholds_to_balance() -> None:
    asked = holding([0, 4, 0], "x" * BLOCK * 4, requests=[200, 299, 299])
    assert picker("cache-aware-picker", balanceRelThreshold=1.5).pick(asked, [])[0].name == "e1"


def test_cache_aware_spreads_new_prompts_over_equal_trees() -> None:
    assert shares(picker("cache-aware-picker"), fleet(4), []) == about(0.25, 0.25, 0.25, 0.25)
