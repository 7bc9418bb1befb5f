"""The /metrics page as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from pointsman.observability.telemetry import Telemetry, gauge
from pointsman.testing import fleet, request
from pointsman.types import Decision, Ending, InferenceRequest, Outcome, Prediction, Usage


def decision(chosen: int = 0, **fields: Any) -> Decision:
    endpoints = fleet(models=[frozenset({fields.get("model", "m")})] * 2)
    defaults = {"request_id": "r1", "model": "m", "at_s": 0.0, "profile": "default"}
    return Decision(**(defaults | {"candidates": endpoints, "chosen": endpoints[chosen]} | fields))


def outcome(**fields: Any) -> Outcome:
    return Outcome(**({"ending": Ending.OK, "status": 200, "endpoint": "e0"} | fields))


def read(telemetry: Telemetry) -> dict[str, dict[frozenset[tuple[str, str]], float]]:
    """Sample name to values by labels."""
    found: dict[str, dict[frozenset[tuple[str, str]], float]] = {}
    for family in text_string_to_metric_families(telemetry.page().decode()):
        assert family.documentation
        for sample in family.samples:
            labels = frozenset(sample.labels.items())
            assert labels not in found.setdefault(sample.name, {}), "a series twice"
            found[sample.name][labels] = sample.value
    return found


def value(telemetry: Telemetry, name: str, **labels: str) -> float:
    """The sum of the series that carry these labels."""
    wanted = labels.items()
    return sum(v for k, v in read(telemetry).get(name, {}).items() if wanted <= dict(k).items())


@pytest.fixture
def telemetry() -> Telemetry:
    return Telemetry()


def test_a_quiet_page_is_a_page(telemetry: Telemetry) -> None:
    assert read(telemetry) == {}
    assert b"# TYPE pointsman_requests_total counter" in telemetry.page()


def test_requests_are_counted_by_how_they_ended(telemetry: Telemetry) -> None:
    telemetry(request(), decision(), outcome())
    telemetry(request(), decision(), outcome())
    telemetry(request(), decision(), outcome(ending=Ending.ERROR, status=503, reason="upstream"))
    telemetry(request(), None, outcome(ending=Ending.REFUSED, status=429, endpoint="", reason="saturated"))
    name = "pointsman_requests_total"
    assert value(telemetry, name) == 4
    assert value(telemetry, name, ending="ok", status="200", model="m", endpoint="e0") == 2
    assert value(telemetry, name, ending="error", status="503", reason="upstream") == 1
    assert value(telemetry, name, ending="refused", status="429", reason="saturated", model="") == 1


def test_retries_count_at_the_endpoint_that_was_left(telemetry: Telemetry) -> None:
    telemetry(request(), decision(tried=("e1", "e2")), outcome(tries=3))
    assert value(telemetry, "pointsman_retries_total", endpoint="e1") == 1
    assert value(telemetry, "pointsman_retries_total") == 2


def test_tokens_as_the_engine_said_and_as_we_thought(telemetry: Telemetry) -> None:
    usage = Usage(prompt_tokens=100, output_tokens=10, cached_tokens=64)
    telemetry(request(), decision(prompt_tokens=90, matched_tokens=60), outcome(usage=usage))
    telemetry(request(), decision(prompt_tokens=5), outcome())
    kinds = {"prompt": 100, "output": 10, "cached": 64, "estimated_prompt": 95, "estimated_cached": 60}
    for kind, tokens in kinds.items():
        assert value(telemetry, "pointsman_tokens_total", endpoint="e0", kind=kind) == tokens


def test_histograms_are_cumulative_and_count_everything(telemetry: Telemetry) -> None:
    for ttft_s in (0.0005, 0.02, 0.02, 1000.0):
        telemetry(request(), decision(), outcome(ttft_s=ttft_s, duration_s=ttft_s * 2))
    for name, total in (
        ("pointsman_ttft_seconds", 1000.0405),
        ("pointsman_request_duration_seconds", 2000.081),
    ):
        buckets: Mapping[frozenset[tuple[str, str]], float] = read(telemetry)[f"{name}_bucket"]
        rows = sorted((float(dict(labels)["le"]), count) for labels, count in buckets.items())
        counts = [count for _, count in rows]
        assert counts == sorted(counts)
        assert rows[-1] == (float("inf"), 4)
        assert value(telemetry, f"{name}_count") == 4
        assert value(telemetry, f"{name}_sum") == pytest.approx(total)
    assert value(telemetry, "pointsman_ttft_seconds_bucket", le="0.001") == 1
    assert value(telemetry, "pointsman_ttft_seconds_bucket", le="0.025") == 3


def test_a_request_without_first_byte_has_no_ttft(telemetry: Telemetry) -> None:
    telemetry(request(), decision(), outcome(ending=Ending.CANCELLED, status=0))
    assert value(telemetry, "pointsman_ttft_seconds_count") == 0
    assert value(telemetry, "pointsman_request_duration_seconds_count") == 1


PREDICTED = Prediction(queue_s=0.3, prefill_s=0.2, step_s=0.01)


def test_what_was_predicted_of_streams_is_compared_with_what_came(telemetry: Telemetry) -> None:
    came = outcome(decided_s=0.1, ttft_s=1.1, duration_s=3.1, usage=Usage(output_tokens=101))
    telemetry(request(stream=True), decision(predicted=PREDICTED), came)
    for name, ratio in (("ttft", 2.0), ("tpot", 2.0)):  # a second instead of half of one; 20 ms instead of 10
        assert value(telemetry, f"pointsman_{name}_to_predicted_sum", endpoint="e0") == pytest.approx(ratio)
        assert value(telemetry, f"pointsman_{name}_to_predicted_count", endpoint="e0") == 1
    without_usage = outcome(ttft_s=0.25, duration_s=3.1)
    telemetry(request(stream=True), decision(predicted=PREDICTED), without_usage)
    assert value(telemetry, "pointsman_ttft_to_predicted_bucket", le="0.5") == 1
    assert value(telemetry, "pointsman_ttft_to_predicted_count") == 2
    assert value(telemetry, "pointsman_tpot_to_predicted_count") == 1


@pytest.mark.parametrize(
    ("asked", "predicted", "became"),
    [
        (request(), PREDICTED, outcome(ttft_s=1.0, duration_s=2.0)),  # its first byte is its last
        (request(stream=True), None, outcome(ttft_s=1.0, duration_s=2.0)),
        (request(stream=True), PREDICTED, outcome(ending=Ending.FAILED, ttft_s=1.0, duration_s=2.0)),
        (request(stream=True), PREDICTED, outcome(ending=Ending.CANCELLED)),
    ],
)
def test_nothing_else_is_compared(
    telemetry: Telemetry, asked: InferenceRequest, predicted: Prediction | None, became: Outcome
) -> None:
    telemetry(asked, decision(predicted=predicted), became)
    assert value(telemetry, "pointsman_request_duration_seconds_count") == 1
    assert value(telemetry, "pointsman_ttft_to_predicted_count") == 0


def test_steps_of_several_choices_at_once_are_not_tokens(telemetry: Telemetry) -> None:
    came = outcome(ttft_s=1.0, duration_s=3.0, usage=Usage(output_tokens=400))
    telemetry(request(stream=True, n=4), decision(predicted=PREDICTED), came)
    assert value(telemetry, "pointsman_ttft_to_predicted_count") == 1
    assert value(telemetry, "pointsman_tpot_to_predicted_count") == 0


def test_labels_may_hold_anything(telemetry: Telemetry) -> None:
    telemetry(request(), decision(model='a"b\\c\nd'), outcome())
    assert value(telemetry, "pointsman_requests_total", model='a"b\\c\nd') == 1


def test_ids_paths_and_models_of_refused_requests_make_no_series(telemetry: Telemetry) -> None:
    for i in range(500):
        refused = outcome(ending=Ending.REFUSED, status=404, endpoint="", reason="model_not_found")
        telemetry(request(id=f"r{i}", path=f"/v1/p{i}", model=f"invented-{i}"), None, refused)
        telemetry(request(id=f"s{i}"), decision(request_id=f"s{i}"), outcome(duration_s=i / 10))
    assert len(read(telemetry)["pointsman_requests_total"]) == 2
    assert value(telemetry, "pointsman_requests_total") == 1000


def test_further_gauges_are_asked_for_at_each_scrape() -> None:
    level = [1.0]
    telemetry = Telemetry(lambda: [gauge("x", "It.", ("a",), [(("one",), level[0])])])
    assert value(telemetry, "x", a="one") == 1
    level[0] = 2.0
    assert value(telemetry, "x", a="one") == 2


def test_models_that_no_endpoint_serves_get_no_series(telemetry: Telemetry) -> None:
    for i in range(30):
        invented = decision(model=f"invented-{i}")
        telemetry(request(), msgspec.structs.replace(invented, chosen=fleet(1)[0]), outcome())
    assert value(telemetry, "pointsman_requests_total", model="", endpoint="e0") == 30


def test_the_series_of_an_endpoint_that_has_left_end(telemetry: Telemetry) -> None:
    telemetry(request(), decision(), outcome())
    telemetry(request(), decision(), outcome(endpoint="e1"))
    telemetry.forget("e0")
    assert value(telemetry, "pointsman_requests_total") == 1
