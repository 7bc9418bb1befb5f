"""The fit of step times, against lines that are known."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman.predictor.fit import HALF_LIFE_S, PRIOR, StepFit

TRUE = (0.0078, 17e-6, 75e-9, 1 / 17_000)


def line(coefficients: tuple[float, ...], features: tuple[float, ...]) -> float:
    return sum(c * f for c, f in zip(coefficients, features, strict=True))


def learn(true: tuple[float, ...], *, noise: float = 0.0, samples: int = 400, seed: int = 0) -> StepFit:
    rng = random.Random(seed)
    fit = StepFit(0.0)
    for _ in range(samples):
        n = rng.uniform(1, 150)
        features = (1.0, n, n * rng.uniform(500, 9000), rng.choice((0.0, 0.0, 300.0, 2000.0)))
        fit.add(features, line(true, features) * rng.lognormvariate(0, noise), 0.25)
    for _ in range(5):
        fit.solve(PRIOR)
    return fit


def test_nothing_seen_is_the_prior() -> None:
    fit = StepFit(0.0)
    fit.solve(PRIOR)
    assert fit.coefficients == pytest.approx(PRIOR)


@given(st.integers(0, 50))
def test_it_predicts_what_it_has_learned(seed: int) -> None:
    fit = learn(TRUE, noise=0.1, seed=seed)
    for features in (
        (1.0, 20.0, 150_000.0, 0.0),
        (1.0, 100.0, 770_000.0, 0.0),
        (1.0, 50.0, 50_000.0, 1500.0),
    ):
        assert line(fit.coefficients, features) == pytest.approx(line(TRUE, features), rel=0.12)


@given(
    st.lists(
        st.tuples(st.floats(1, 500), st.floats(0, 1e7), st.floats(0, 16_000), st.floats(1e-4, 60.0)),
        max_size=30,
    )
)
def test_whatever_it_is_told_a_larger_load_never_takes_less(
    samples: list[tuple[float, float, float, float]],
) -> None:
    fit = StepFit(0.0)
    for n, context, prefill, step_s in samples:
        fit.add((1.0, n, context, prefill), step_s, 0.25)
        fit.solve(PRIOR)
    assert all(c > 0 for c in fit.coefficients)


def test_what_was_long_ago_counts_for_less() -> None:
    slower = tuple(2 * c for c in TRUE)
    fit = learn(TRUE)
    fit.age(4 * HALF_LIFE_S)
    rng = random.Random(1)
    for _ in range(400):
        n = rng.uniform(1, 150)
        features = (1.0, n, n * 7000.0, 0.0)
        fit.add(features, line(slower, features), 0.25)
    for _ in range(5):
        fit.solve(PRIOR)
    features = (1.0, 100.0, 700_000.0, 0.0)
    assert line(fit.coefficients, features) == pytest.approx(line(slower, features), rel=0.1)
