"""How long answers get, by what is known of the request."""

from __future__ import annotations

import random
from itertools import count, islice

import pytest

from pointsman.predictor.lengths import MAX_GROUPS, MAX_LEVELS, Lengths
from pointsman.testing import request
from pointsman.types import Ending, InferenceRequest, Outcome, Prediction, Usage

TENANT = "x-llm-d-inference-fairness-id"
SECONDS = count(0)
PREDICTED = Prediction(queue_s=0.5, prefill_s=0.5, step_s=0.01)


def ended(lengths: Lengths, made: InferenceRequest, tokens: int, **more: float) -> None:
    outcome = Outcome(ending=Ending.OK, status=200, usage=Usage(output_tokens=tokens), **more)
    over(lengths, made, outcome)


def over(
    lengths: Lengths, made: InferenceRequest, outcome: Outcome, predicted: Prediction | None = PREDICTED
) -> None:
    if id(made) not in lengths._open:
        lengths.sent(made, next(SECONDS))
    lengths.observe(made, outcome, predicted)


def test_answers_to_alike_requests_are_alike() -> None:
    lengths = Lengths()
    short, long = request(max_tokens=100), request(max_tokens=4000)
    for _ in range(200):
        lengths.add(short, 50)
        lengths.add(long, 3000)
    assert lengths.of(short).mean == pytest.approx(50, rel=0.1)
    assert lengths.of(long).mean == pytest.approx(3000, rel=0.1)
    assert lengths.of(request(max_tokens=None)).mean == pytest.approx(1525, rel=0.1)  # the model's
    assert lengths.of(request(model="other")).mean == pytest.approx(1525, rel=0.1)  # the pool's


def test_what_a_token_belongs_to_is_longer_than_the_mean() -> None:
    lengths, rng = Lengths(), random.Random(0)
    for _ in range(2000):
        lengths.add(request(), round(rng.expovariate(1 / 1000)))
    assert lengths.pool.mean == pytest.approx(1000, rel=0.1)
    assert lengths.pool.of_a_token == pytest.approx(2000, rel=0.15)


def test_tenants_and_prompts_that_begin_alike_are_told_apart() -> None:
    lengths = Lengths()
    kinds = [
        ({"headers": {TENANT: "summaries"}, "max_tokens": 4000}, "any prompt", 60),
        ({"headers": {TENANT: "essays"}, "max_tokens": 4000}, "any prompt", 2000),
        ({"max_tokens": 4000}, "You classify. " * 30, 5),
        ({"max_tokens": 4000}, "You reason. " * 30, 3500),
    ]
    for i in range(200):
        for fields, text, tokens in kinds:
            lengths.add(request(f"{text} {i}", **fields), tokens)
    for fields, text, tokens in kinds:
        known = lengths.of(request(f"{text} and another end", **fields))
        assert known.quantile(0.5) == pytest.approx(tokens, rel=0.1)
    assert lengths.of(request("not seen", max_tokens=4000)).quantile(0.99) == pytest.approx(3500, rel=0.1)


def test_an_answer_that_was_cut_says_little_of_what_would_have_come() -> None:
    lengths, rng = Lengths(), random.Random(0)
    for _ in range(3000):
        length = max(1, round(rng.expovariate(1 / 1000)))
        limit = rng.choice((250, 16_000))
        ended(lengths, request(max_tokens=limit), min(limit, length))
    assert lengths.of(request(max_tokens=None)).mean == pytest.approx(1000, rel=0.1)
    assert lengths.of(request(max_tokens=250)).mean == pytest.approx(1000 * (1 - 0.7788), rel=0.1)
    # A limit not seen before: what the model would say, cut.
    assert lengths.of(request(max_tokens=500)).mean == pytest.approx(1000, rel=0.1)
    lengths.add(request(max_tokens=500), 400)
    assert lengths.of(request(max_tokens=500)).mean < 450


def test_streams_that_clients_leave_are_counted_as_far_as_they_came() -> None:
    lengths, rng = Lengths(), random.Random(0)
    made = request(stream=True)
    for _ in range(3000):
        length, patience = rng.expovariate(1 / 1000), rng.expovariate(1 / 700)
        if length < patience:
            ended(lengths, made, max(1, round(length)), response_bytes=max(100, round(100 * length)))
        else:
            gone = Outcome(ending=Ending.CANCELLED, status=200, response_bytes=round(100 * patience))
            over(lengths, made, gone)
    assert lengths.of(made).mean == pytest.approx(1000, rel=0.12)


def test_usage_so_far_of_a_stream_that_was_left_is_not_its_length() -> None:
    lengths = Lengths()
    for _ in range(50):
        so_far = Outcome(ending=Ending.CANCELLED, status=200, usage=Usage(output_tokens=100))
        over(lengths, request(), so_far)
        ended(lengths, request(), 1000)
    assert lengths.of(request()).quantile(0.05) == pytest.approx(1000, rel=0.1)


def test_streams_without_usage_are_measured_by_their_bytes() -> None:
    lengths = Lengths()
    told, untold = request(stream=True, model="told"), request(stream=True, model="untold")
    for _ in range(100):
        ended(lengths, told, 500, response_bytes=500 * 80)
        over(lengths, untold, Outcome(ending=Ending.OK, status=200, response_bytes=200 * 80))
    assert lengths.of(untold).mean == pytest.approx(200, rel=0.1)
    whole = Outcome(ending=Ending.OK, status=200, response_bytes=5000, duration_s=9.0)
    over(lengths, request(model="whole"), whole)  # whoever is told no usage knows nothing
    assert lengths.of(request(model="whole")) is lengths.pool


def test_without_bytes_the_time_tells_how_far_an_answer_came() -> None:
    lengths = Lengths()
    for _ in range(50):
        over(lengths, request(), Outcome(ending=Ending.CANCELLED, status=0, duration_s=11.0))
        ended(lengths, request(), 100)
    known = lengths.of(request())
    assert known.survival(900) == pytest.approx(0.5, abs=0.05)  # ten seconds of steps
    assert known.quantile(0.4) == pytest.approx(100, rel=0.05)


@pytest.mark.parametrize("ending", [Ending.REFUSED, Ending.ERROR, Ending.CANCELLED, Ending.FAILED])
def test_requests_that_never_got_an_answer_say_nothing(ending: Ending) -> None:
    lengths = Lengths()
    over(lengths, request(stream=True), Outcome(ending=ending, status=0, duration_s=60.0))
    over(lengths, request(), Outcome(ending=ending, status=0, duration_s=0.5), None)
    assert lengths.pool.weight == 0


def test_answers_that_are_first_because_they_are_short_do_not_make_answers_look_short() -> None:
    rng, lengths, finished = random.Random(0), Lengths(), Lengths()
    ends = list[tuple[float, int, InferenceRequest]]()
    for sent_s in range(2000):
        made, tokens = request(id=str(sent_s)), rng.choice((100, 2000))
        lengths.sent(made, next(SECONDS))
        ends.append((sent_s + tokens, tokens, made))
    over = iter(sorted(ends, key=lambda end: end[0]))

    def let_end(count: int) -> None:
        for _, tokens, made in islice(over, count):
            ended(lengths, made, tokens)
            finished.add(made, tokens)

    let_end(950)
    assert finished.pool.mean < 150
    assert lengths.pool.weight < 10, "the first long one is not over yet"
    let_end(550)
    assert finished.pool.mean < 800
    assert lengths.pool.weight > 300
    assert lengths.pool.mean == pytest.approx(1050, rel=0.1)


def test_an_answer_that_never_ends_does_not_keep_the_others_from_being_learned() -> None:
    lengths, stuck = Lengths(most_waiting=10), request(id="stuck")
    lengths.sent(stuck, next(SECONDS))
    for i in range(12):
        made = request(id=str(i))
        lengths.sent(made, next(SECONDS))
        ended(lengths, made, 100)
    assert lengths.pool.weight == 12
    ended(lengths, stuck, 5000)
    assert lengths.pool.weight == 13
    assert not lengths._open
    assert not lengths._order


def test_a_request_that_is_tried_elsewhere_counts_once_and_one_that_failed_before_an_answer_never() -> None:
    lengths, made, failed = Lengths(), request(id="a"), request(id="b", stream=True)
    for each in (made, failed, made):
        lengths.sent(each, next(SECONDS))
    over(lengths, failed, Outcome(ending=Ending.FAILED, status=502))
    ended(lengths, made, 100)
    assert lengths.pool.weight == 1
    assert not lengths._open
    assert not lengths._order


def test_each_of_several_choices_is_an_answer_of_its_own_length() -> None:
    lengths = Lengths()
    for _ in range(50):
        ended(lengths, request(n=4, max_tokens=100), 4 * 80)
    assert lengths.of(request(n=4, max_tokens=100)).mean == pytest.approx(80, rel=0.1)


def test_clients_that_make_up_models_or_prompts_do_not_grow_it() -> None:
    lengths = Lengths()
    often = request("often " * 100)
    for i in range(MAX_GROUPS + 100):
        lengths.add(request(str(i) + " prompt" * 50, model=f"m{i}", max_tokens=2**i), 10)
        lengths.add(often, 100)
    assert len(lengths.levels) <= MAX_LEVELS
    assert len(lengths.groups) == MAX_GROUPS
    assert lengths.of(often).mean == pytest.approx(100, rel=0.1)
