"""How many bytes of a prompt a token is."""

from __future__ import annotations

import pytest

from pointsman.predictor.token_bytes import MAX_MODELS, TokenBytes
from pointsman.prefix.approximate import PrefixIndex
from pointsman.testing import request
from pointsman.types import Ending, InferenceRequest, Outcome, Prompt, Usage

TEXT = "x" * 12_000
"""3,000 tokens by the estimate."""


def ended(tokens: int | None, ending: Ending = Ending.OK) -> Outcome:
    return Outcome(ending=ending, status=200, usage=Usage(prompt_tokens=tokens))


def taught(bytes_per_token: float, times: int = 50, **fields: object) -> TokenBytes:
    """What is known after so many prompts of a model."""
    known = TokenBytes()
    for _ in range(times):
        known.learn(request(TEXT, **fields), ended(round(len(TEXT) / bytes_per_token)))
    return known


@pytest.mark.parametrize("bytes_per_token", [1.3, 2.5, 5.0, 8.0])
def test_prompts_are_as_long_as_the_model_s_earlier_ones_suggest(bytes_per_token: float) -> None:
    corrected = taught(bytes_per_token).corrected(request(TEXT[:8000]))
    assert corrected.prompt_tokens == pytest.approx(8000 / bytes_per_token, rel=0.03)


def test_each_model_has_its_own_and_an_unknown_one_the_estimate() -> None:
    known = taught(2.5, model="dense")
    same = request(TEXT, model="other")
    assert known.corrected(same) is same
    assert known.corrected(request(TEXT, model="dense")).prompt_tokens > 4000


def test_a_new_tokenizer_is_followed() -> None:
    known = taught(2.5)
    for _ in range(300):
        known.learn(request(TEXT), ended(round(len(TEXT) / 6)))
    assert known.corrected(request(TEXT)).prompt_tokens == pytest.approx(2000, rel=0.05)


def test_little_off_is_left_alone() -> None:
    asked = request(TEXT)
    assert taught(4.03).corrected(asked) is asked
    known = taught(2.5)
    for _ in range(2000):
        known.learn(request(TEXT), ended(3000))
    assert known.corrected(asked) is asked


@pytest.mark.parametrize(("tokens", "most"), [(1, 16.0), (1_000_000, 1.0)])
def test_nonsense_is_bounded(tokens: int, most: float) -> None:
    known = TokenBytes()
    for _ in range(100):
        known.learn(request(TEXT), ended(tokens))
    assert known.by_model["m"] == most


def test_requests_that_do_not_say_teach_nothing() -> None:
    known = TokenBytes()
    for outcome in (ended(None), ended(0), ended(9000, Ending.CANCELLED), ended(9000, Ending.ERROR)):
        known.learn(request(TEXT), outcome)
    assert known.by_model == {}


IDS = request(
    prompts=(Prompt(b"[" + b",".join(b"%d" % (50_000 + i) for i in range(2000)), 2000),), prompt_tokens=2000
)
PICTURE = request(TEXT, media=(("cat", 700),))


@pytest.mark.parametrize("given", [IDS, PICTURE, request("")])
def test_token_ids_and_media_are_neither_learned_from_nor_corrected(given: InferenceRequest) -> None:
    known = TokenBytes()
    for _ in range(50):
        known.learn(given, ended(123))
    assert known.by_model == {}
    assert taught(2.5).corrected(given) is given


def test_a_corrected_request_has_the_prefix_blocks_it_had() -> None:
    index = PrefixIndex()
    index.add(0)
    asked = request(TEXT)
    index.insert(0, index.match(asked).chains)
    corrected = taught(2.5).corrected(asked)
    assert corrected.prompts == asked.prompts
    match = index.match(corrected)
    assert match.ratio(0) == index.match(asked).ratio(0) > 0.9
    assert match.tokens(0) == pytest.approx(match.ratio(0) * corrected.prompt_tokens, abs=1)


def test_clients_that_make_up_models_do_not_grow_it() -> None:
    known = TokenBytes()
    for i in range(MAX_MODELS + 100):
        known.learn(request(TEXT, model=f"m{i}"), ended(9000))
    assert len(known.by_model) == MAX_MODELS
