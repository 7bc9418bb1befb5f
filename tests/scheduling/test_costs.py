"""Costs as scores, and the least of them."""

from __future__ import annotations

from collections import Counter

from pointsman.scheduling.costs import cheapest, scores_of
from pointsman.testing import cycle, fleet, services


def test_scores_rise_as_costs_fall() -> None:
    assert scores_of([5.0, 1.0, 3.0]) == [0.0, 1.0, 0.5]
    assert scores_of([-1.0, 0.0]) == [1.0, 0.0]
    assert scores_of([2.0, 2.0]) == [1.0, 1.0]
    assert scores_of([1e308, -1e308]) == [1.0, 1.0], "a spread that is no number tells nothing"


def test_the_cheapest_is_any_of_the_equal_ones() -> None:
    asked = cycle(fleet(4), given=services(seed=3))
    assert cheapest(asked, [4, 1, 2, 3]).name == "e1"
    counts = Counter(cheapest(asked, [1, 2, 1, 1]).name for _ in range(3000))
    assert counts.keys() == {"e0", "e2", "e3"}
    assert min(counts.values()) > 900
