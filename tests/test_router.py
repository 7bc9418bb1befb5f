"""One request's life, without a network."""

from __future__ import annotations

import random

import pytest

from pointsman.config import Endpoint
from pointsman.endpoints.pool import Pool
from pointsman.endpoints.target import targets_of
from pointsman.errors import ModelNotFound, NoEndpoints
from pointsman.prefix.approximate import PrefixIndex
from pointsman.prefix.follow import follow
from pointsman.router import Router
from pointsman.scheduling.cycle import Services
from pointsman.scheduling.presets import build_scheduler, load_policy
from pointsman.testing import request
from pointsman.types import Ending, Outcome, Usage

TEXT = "x" * 8000


def router(policy: str = "llm-d-affinity") -> Router:
    """One over two endpoints."""
    pool, index = Pool(lambda: 1.0), PrefixIndex()
    follow(index, pool)
    for port in (1, 2):
        pool.apply(f"test {port}", targets_of(Endpoint(url=f"http://10.0.0.{port}:8000")))
    services = Services(index, lambda: 1.0, random.Random(0))
    return Router(pool, build_scheduler(load_policy(policy), services))


def test_prompt_tokens_are_learned_from_what_engines_report_and_count_as_load() -> None:
    given = router()
    outcome = Outcome(ending=Ending.OK, status=200, usage=Usage(prompt_tokens=4000))
    for i in range(30):
        given.close(given.open(request(f"{i:4}{TEXT}")), outcome)
    flight = given.open(request(TEXT))
    assert 3900 < flight.request.prompt_tokens < 4010
    assert flight.decision.prompt_tokens == flight.request.prompt_tokens
    load = flight.decision.chosen.load
    assert load.tokens == load.context_tokens == flight.request.prompt_tokens
    given.close(flight, outcome)
    assert (load.requests, load.tokens, load.context_tokens) == (0, 0, 0)
    again = given.open(request(TEXT))
    assert again.decision.matched_tokens > 3500


def test_a_request_for_a_model_nobody_lists_goes_anywhere_where_models_are_not_known() -> None:
    given = router()
    given.pool.learn_models("10.0.0.1:8000", [{"id": "m"}])
    given.pool.learn_models("10.0.0.2:8000", [{"id": "n"}])
    with pytest.raises(ModelNotFound):
        given.candidates("other")
    given._knows_models = False
    assert len(given.candidates("other")) == 2
    assert [e.name for e in given.candidates("n")] == ["10.0.0.2:8000"]


def test_only_the_eligible_are_chosen_and_none_is_an_error() -> None:
    given = router()
    for _ in range(4):
        flight = given.open(request(TEXT), lambda endpoint: endpoint.name == "10.0.0.2:8000")
        assert flight.decision.chosen.name == "10.0.0.2:8000"
    with pytest.raises(NoEndpoints):
        given.open(request(TEXT), lambda endpoint: False)


def test_a_request_that_was_sent_elsewhere_than_decided_counts_there() -> None:
    given = router()
    flight = given.open(request(TEXT))
    chosen = flight.decision.chosen
    other = next(e for e in given.candidates("m") if e is not chosen)
    given.moved(flight, other)
    assert (chosen.load.requests, chosen.load.tokens) == (0, 0)
    assert (other.load.requests, other.load.tokens) == (1, 2000)
    assert flight.decision.tried == (chosen.name,)
    given.close(flight, Outcome(ending=Ending.OK, status=200))
    assert (other.load.requests, other.load.tokens, other.load.context_tokens) == (0, 0, 0)
