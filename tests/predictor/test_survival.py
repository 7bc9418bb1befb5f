"""Life tables, against samples whose distribution is known."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pointsman.predictor.survival import EDGES, Table, bin_of, exponential

Draw = Callable[[random.Random], float]


def draw_exponential(rng: random.Random) -> float:
    return rng.expovariate(1 / 1000)


def draw_bimodal(rng: random.Random) -> float:
    return rng.gauss(100, 10) if rng.random() < 0.5 else rng.gauss(1900, 100)


def table(
    draw: Draw, n: int = 4000, *, patience: float | None = None, seed: int = 0, **given: float
) -> Table:
    """A table of ``n`` draws, each broken off by a client whose patience is exponential."""
    rng = random.Random(seed)
    made = Table(exponential(300.0), prior=1.0, **{"memory": 1e9} | given)
    for _ in range(n):
        length = max(1.0, draw(rng))
        breaks_off = rng.expovariate(1 / patience) if patience else length
        if breaks_off < length:
            made.left(breaks_off)
        else:
            made.ended(length)
    made.draw()
    return made


lengths = st.lists(st.floats(10.0, 100_000.0), min_size=1, max_size=60)
ages = st.floats(0.0, 200_000.0)


@given(lengths)
def test_where_nothing_was_broken_off_the_means_are_those_of_the_sample(sample: list[float]) -> None:
    made = Table(exponential(300.0), prior=1e-9, memory=1e9)
    for length in sample:
        made.ended(length)
    made.draw()
    mean = sum(sample) / len(sample)
    assert made.mean == pytest.approx(mean, rel=1e-3)
    # The spread in a bin is kept unless it is so lopsided that no straight line has it.
    assert made.of_a_token == pytest.approx(sum(x * x for x in sample) / sum(sample), rel=0.07)


@given(lengths)
def test_the_share_that_reaches_an_edge_is_that_of_the_sample(sample: list[float]) -> None:
    made = Table(exponential(300.0), prior=1e-9, memory=1e9)
    for length in sample:
        made.ended(length)
    made.draw()
    for edge in EDGES[1:-1]:
        longer = sum(1 for length in sample if length >= edge) / len(sample)
        assert made.survival(edge) == pytest.approx(longer, abs=1e-6)


@given(lengths, lengths, ages, ages)
def test_the_older_the_fewer_are_left(
    ended: list[float], left: list[float], one: float, other: float
) -> None:
    made = Table(exponential(300.0), prior=1.0, memory=1e9)
    for length in ended:
        made.ended(length)
    for length in left:
        made.left(length)
    made.draw()
    young, old = sorted((one, other))
    assert 0 <= made.survival(old) <= made.survival(young) <= 1
    assert made.survival(0) == 1
    assert made.remaining(young) >= 0
    if made.survival(old) > 1e-3:  # what is left at an age is left at the next one, or came in between
        least = made.survival(old) / made.survival(young) * (old - young + made.remaining(old))
        assert made.remaining(young) >= least - 1e-6 * (1 + least)


@given(lengths, st.floats(0.001, 0.999))
def test_quantiles_are_where_so_many_have_ended(sample: list[float], q: float) -> None:
    made = Table(exponential(300.0), prior=1.0, memory=1e9)
    for length in sample:
        made.ended(length)
    made.draw()
    at = made.quantile(q)
    assert made.survival(at + 1e-6 * (1 + at)) <= 1 - q + 1e-6
    assert made.survival(at * (1 - 1e-6) - 1e-6) >= 1 - q - 1e-6 or at < 1e-3


@given(st.floats(0.0, 1e7))
def test_each_length_is_in_one_bin(tokens: float) -> None:
    k = bin_of(tokens)
    assert EDGES[k] <= tokens
    assert tokens < EDGES[k + 1] or tokens >= EDGES[-2]


@pytest.mark.parametrize("draw", [draw_exponential, draw_bimodal])
@pytest.mark.parametrize("patience", [2000.0, 700.0])
def test_what_is_broken_off_does_not_bias_the_mean_as_it_does_that_of_the_finished(
    draw: Draw, patience: float
) -> None:
    rng, finished = random.Random(0), []
    for _ in range(4000):
        length = max(1.0, draw(rng))
        if rng.expovariate(1 / patience) >= length:
            finished.append(length)
    assert sum(finished) / len(finished) < 800
    assert table(draw, patience=patience).mean == pytest.approx(1000, rel=0.08)


def test_the_rest_of_an_exponential_answer_is_always_as_long() -> None:
    made = table(draw_exponential, 20_000)
    for age in (0, 100, 500, 1500, 3000):
        assert made.remaining(age) == pytest.approx(1000, rel=0.12), age


def test_an_answer_that_is_not_short_is_long() -> None:
    made = table(draw_bimodal)
    assert made.remaining(0) == pytest.approx(1000, rel=0.05)
    assert made.remaining(500) == pytest.approx(1400, rel=0.05)
    assert made.remaining(1500) == pytest.approx(400, rel=0.15)
    assert made.quantile(0.4) < 130
    assert made.quantile(0.6) > 1600
    assert made.survival(500) == pytest.approx(0.5, abs=0.03)


def test_what_changed_is_followed() -> None:
    made = table(draw_bimodal, 8000, memory=1000)
    for _ in range(3000):
        made.ended(4000.0)
    assert made.mean == pytest.approx(4000, rel=0.1)


def test_who_knows_little_is_as_its_parent_and_does_not_exceed_its_limit() -> None:
    parent = table(draw_exponential)
    child = Table(parent, prior=5.0, memory=1e9)
    assert child.mean == pytest.approx(parent.mean)
    limited = Table(parent, prior=5.0, memory=1e9, limit=200.0)
    assert limited.survival(199) > 0.75
    assert limited.survival(200) == 0
    assert limited.mean == pytest.approx(1000 * (1 - 0.8187), rel=0.05)  # of exp(-0.2)
    child.ended(10.0)
    assert 0.6 * parent.mean < child.mean < parent.mean


def test_an_answer_longer_than_the_limit_is_believed() -> None:
    made = Table(exponential(300.0), prior=1.0, memory=1e9, limit=127.0)
    for _ in range(100):
        made.ended(1000.0)
    assert made.mean == pytest.approx(1000, rel=0.05)


def test_nothing_known_is_exponential() -> None:
    curve = exponential(300.0)
    assert curve.mean == pytest.approx(300, rel=0.01)
    assert curve.of_a_token == pytest.approx(600, rel=0.03)


@given(lengths, st.floats(0.01, 1.0))
def test_age_changes_confidence_and_not_what_is_believed(sample: list[float], kept: float) -> None:
    assume(len(sample) > 1)
    made = Table(exponential(300.0), prior=1e-9, memory=1e9)
    for length in sample:
        made.ended(length)
    made.draw()
    before = made.mean
    made.scale(kept)
    made.draw()
    assert made.mean == pytest.approx(before, rel=1e-3)
    assert made.weight == pytest.approx(kept * len(sample))


def test_what_was_learned_is_there_as_soon_as_somebody_asks() -> None:
    made = Table(exponential(300.0), prior=1.0, memory=1e9)
    before = made.mean
    made.ended(3000.0)
    assert made.mean > 2 * before
    made.recall({}, 1.0)
    assert made.mean == before
