"""How long answers get."""

from __future__ import annotations

import random

import pytest

from pointsman.predictor.lengths import MAX_KEYS, Lengths
from pointsman.testing import request


def test_answers_to_alike_requests_are_alike() -> None:
    lengths = Lengths()
    short, long = request(max_tokens=100), request(max_tokens=4000)
    for _ in range(200):
        lengths.add(short, 50)
        lengths.add(long, 3000)
    assert lengths.of(short).mean == pytest.approx(50, rel=0.1)
    assert lengths.of(long).mean == pytest.approx(3000, rel=0.1)
    assert lengths.of(request(max_tokens=None)).mean == pytest.approx(1525, rel=0.1)  # the pool's


def test_what_a_token_belongs_to_is_longer_than_the_mean() -> None:
    lengths, rng = Lengths(), random.Random(0)
    for _ in range(2000):
        lengths.add(request(), round(rng.expovariate(1 / 1000)))
    assert lengths.pool.mean == pytest.approx(1000, rel=0.1)
    assert lengths.pool.of_a_token == pytest.approx(2000, rel=0.15)


def test_clients_that_make_up_models_do_not_grow_it() -> None:
    lengths = Lengths()
    for i in range(MAX_KEYS + 100):
        lengths.add(request(model=f"m{i}"), 10)
    assert len(lengths._by_key) == MAX_KEYS
