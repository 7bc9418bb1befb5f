"""Linear laws are found, followed when they change, and never say that more load is faster."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from hypothesis import given
from hypothesis import strategies as st

from pointsman.scheduling.regression import Regression

LAW = (0.02, 0.06, 0.04)


def samples(
    law: Sequence[float], n: int, seed: int = 0, noise: float = 0.0
) -> Iterator[tuple[list[float], float]]:
    rng = random.Random(seed)
    for _ in range(n):
        features = [1.0, rng.choice((0.0, 1.0, 7.5)), rng.random() * 20]
        exact = sum(c * x for c, x in zip(law, features, strict=True))
        yield features, exact * rng.lognormvariate(0, noise)


def trained(*laws: Sequence[float], memory: float = 200, noise: float = 0.0) -> Regression:
    found = Regression(3, memory)
    for seed, law in enumerate(laws):
        for features, value in samples(law, 1000, seed, noise):
            found.learn(features, value)
    return found


def worst(found: Regression, law: Sequence[float]) -> float:
    """Greatest relative error of its predictions."""
    return max(abs(found.predict(x) / value - 1) for x, value in samples(law, 200, seed=99))


def test_a_law_is_found() -> None:
    assert worst(trained(LAW), LAW) < 0.01
    assert worst(trained(LAW, noise=0.2), LAW) < 0.15


def test_a_law_that_changes_is_followed() -> None:
    slower = [3 * c for c in LAW]
    assert worst(trained(LAW, slower), slower) < 0.1
    assert worst(trained(LAW, slower, memory=1e6), slower) > 0.2, "one that forgets nothing does not follow"


def test_a_few_very_slow_answers_do_not_spoil_the_usual_ones() -> None:
    found = Regression(3, 200)
    for i, (features, value) in enumerate(samples(LAW, 1000)):
        found.learn(features, 100.0 if i % 50 == 0 else value)
    assert worst(found, LAW) < 0.1


def test_nothing_is_predicted_before_anything_is_seen() -> None:
    assert Regression(3, 200).predict([1.0, 5.0, 5.0]) == 0.0


@given(
    st.lists(
        st.tuples(st.lists(st.floats(0, 1e4), min_size=3, max_size=3), st.floats(0, 1e6)),
        min_size=1,
        max_size=50,
    )
)
def test_more_of_anything_is_never_predicted_to_be_faster(seen: list[tuple[list[float], float]]) -> None:
    found = Regression(3, 20)
    for features, value in seen:
        found.learn(features, value)
    assert all(0.0 <= c < float("inf") for c in found.coefficients)
