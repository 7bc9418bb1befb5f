"""llm-d's predicted-latency plugins on our learned model (facts 3 and 8)."""

from __future__ import annotations

import logging
import random
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pointsman.errors import Saturated, SettingsError
from pointsman.observability.decisions import render
from pointsman.prefix.approximate import PrefixIndex
from pointsman.registry import own_name
from pointsman.scheduling.cycle import Cycle, Services
from pointsman.scheduling.picker_config import LoadedConfig, load_picker_config, load_tree
from pointsman.scheduling.presets import build_scheduler
from pointsman.scheduling.scheduler import Scheduler
from pointsman.scheduling.signals import predicted_latency
from pointsman.testing import fleet, request
from pointsman.twin.policies import policy
from pointsman.twin.run import Simulation
from pointsman.twin.scenario import load_scenario
from pointsman.types import Decision, Ending, Endpoint, Outcome, Usage

CONFIGS = Path(__file__).parent / "configs"
PROMPT = "once upon a time there was a long prompt " * 100
"""1,025 tokens."""
PRODUCER, SCORER, TIER, ADMITTER = (
    "predicted-latency-producer",
    "latency-scorer",
    "slo-headroom-tier-filter",
    "latency-slo-admitter",
)
TTFT, TPOT = "x-llm-d-slo-ttft-ms", "x-llm-d-slo-tpot-ms"
STREAMING = {"type": PRODUCER, "parameters": {"streamingMode": True}}


def loaded(*plugins: Any) -> LoadedConfig:
    specs = [{"type": p} if isinstance(p, str) else p for p in plugins]
    return load_tree(
        {"apiVersion": "llm-d.ai/v1alpha1", "kind": "EndpointPickerConfig", "plugins": specs}, "test"
    )


class Place:
    """A scheduler of its own over a fleet. Nothing is learned yet: all endpoints are equally fast."""

    def __init__(self, endpoints: list[Endpoint], *plugins: Any) -> None:
        self.services = Services(PrefixIndex(), lambda: 100.0, random.Random(0))
        for endpoint in endpoints:
            self.services.prefix.add(endpoint.slot)
        self.scheduler: Scheduler = build_scheduler(loaded(*plugins), self.services)
        self.endpoints = endpoints
        self.sent = 0

    def decide(self, text: str = "", **fields: Any) -> Decision:
        """For a prompt that nobody has, unless it is given."""
        self.sent += 1
        made = request(text or f"{self.sent} {PROMPT}", id=str(self.sent), **fields)
        return self.scheduler.schedule(made, self.endpoints)

    def send(self, **fields: Any) -> str:
        return self.decide(**fields).chosen.name

    def scores(self, **headers: str) -> list[float]:
        asked = {name.replace("_", "-"): value for name, value in headers.items()}
        return list(self.decide(headers=asked).scores[SCORER])

    def predicted(self, **fields: Any) -> Any:
        asked = Cycle(request(PROMPT, **fields), self.endpoints, self.services)
        return asked.get(predicted_latency)


# -- predictions


def test_a_request_waits_for_what_is_queued_and_counts_itself() -> None:
    idle, queued, decoding = (
        Place(fleet(tokens=[0, 50_000, 0], requests=[0, 1, 40]), STREAMING).predicted().values()
    )
    assert queued.ttft_s == pytest.approx(idle.ttft_s + 50_000 / 12_000, rel=0.05)
    assert (
        decoding.tpot_s > idle.tpot_s > 0.010
    )  # a step without sequences takes 10 ms before anything is known


def test_what_is_cached_needs_no_prefill() -> None:
    place = Place(fleet(2), STREAMING)
    holder = place.decide(PROMPT).chosen.slot
    known = place.predicted()
    assert known[holder].ttft_s < 0.3 * known[1 - holder].ttft_s


def test_without_streaming_mode_the_time_to_the_last_token_counts() -> None:
    place = Place(fleet(requests=[0, 60]), PRODUCER)
    idle, decoding = place.predicted().values()
    assert idle.ttft_s > 300 * 0.010  # 300 tokens are the usual answer of which nothing is known
    assert decoding.ttft_s > 1.1 * idle.ttft_s
    assert (idle.tpot_s, idle.tpot_headroom_s) == (0.0, 0.0)


def test_answers_teach_how_long_the_next_ones_get() -> None:
    place = Place(fleet(1), PRODUCER)
    before = place.predicted()[0].ttft_s
    for _ in range(60):
        decision = place.decide()
        outcome = Outcome(ending=Ending.OK, status=200, usage=Usage(output_tokens=3000))
        place.scheduler.finish(request(PROMPT), decision, outcome)
    assert place.predicted()[0].ttft_s > 5 * before


def test_prefill_endpoints_have_no_tpot() -> None:
    role = {"type": PRODUCER, "parameters": {"streamingMode": True, "endpointRoleLabel": "role"}}
    prefill, decode = (
        Place(fleet(labels=[{"role": "prefill"}, {"role": "decode"}]), role)
        .predicted(headers={TTFT: "9000", TPOT: "1"})
        .values()
    )
    assert prefill.kept
    assert not decode.kept


def test_the_buffer_and_the_strictest_promise_there_move_the_tpot_to_keep() -> None:
    asked: dict[str, Any] = {"headers": {TPOT: "100"}}
    place = Place(fleet(1), {"type": PRODUCER, "parameters": {"streamingMode": True, "sloBufferFactor": 0.5}})
    half = place.predicted(**asked)[0]
    assert half.tpot_headroom_s + half.tpot_s == pytest.approx(0.050)
    strict = request(PROMPT, headers={TPOT: "40"})
    decision = place.scheduler.schedule(strict, place.endpoints)
    shared = place.predicted(**asked)[0]
    assert shared.tpot_headroom_s + shared.tpot_s == pytest.approx(0.020)
    place.scheduler.finish(strict, decision, Outcome(ending=Ending.CANCELLED, status=0))
    after = place.predicted(**asked)[0]
    assert after.tpot_headroom_s + after.tpot_s == pytest.approx(0.050)


def test_a_request_sent_again_promises_once() -> None:
    place = Place(fleet(2), STREAMING)
    strict = request(PROMPT, headers={TPOT: "40"})
    place.scheduler.schedule(strict, place.endpoints[:1])
    decision = place.scheduler.schedule(strict, place.endpoints[1:])
    known = place.predicted(headers={TPOT: "100"})
    assert [known[slot].tpot_headroom_s + known[slot].tpot_s for slot in (0, 1)] == pytest.approx([0.1, 0.04])
    place.scheduler.finish(strict, decision, Outcome(ending=Ending.OK, status=200))
    known = place.predicted(headers={TPOT: "100"})
    assert [known[slot].tpot_headroom_s + known[slot].tpot_s for slot in (0, 1)] == pytest.approx([0.1, 0.1])


@pytest.mark.parametrize("nonsense", ["", "soon", "-3", "0", "nan", "inf"])
def test_a_promise_that_is_no_number_is_none(nonsense: str) -> None:
    (known,) = Place(fleet(1), STREAMING).predicted(headers={TTFT: nonsense}).values()
    assert not known.kept
    assert known.ttft_headroom_s == -known.ttft_s


def test_the_new_header_counts_before_the_old_one() -> None:
    place = Place(fleet(1), STREAMING)
    assert not place.predicted(headers={TTFT: "1", "x-slo-ttft-ms": "60000"})[0].kept
    assert place.predicted(headers={"x-slo-ttft-ms": "60000"})[0].kept


def test_decisions_carry_what_was_predicted_and_endpoints_what_was_learned() -> None:
    place = Place(fleet(tokens=[12_000]), PRODUCER, SCORER)
    decision = place.decide()
    told = render(decision)["predicted"]
    assert told["queue_s"] == pytest.approx(1.0, rel=0.05)
    assert told["prefill_s"] == pytest.approx(0.010 + 1025 / 12_000, rel=0.1)
    assert told["step_s"] > 0.010
    assert place.scheduler.learned(place.endpoints)["e0"].prefill_tok_s == pytest.approx(12_000, rel=0.05)


def test_training_only_predicts_nothing_and_the_composite_decides() -> None:
    untold = {"type": PRODUCER, "parameters": {"predictInProduce": False}}
    composite = {"type": SCORER, "parameters": {"compositeKVWeight": 3, "compositePrefixWeight": 0}}
    place = Place(fleet(kv_usage=[0.2, 0.6], waiting=[10, 5]), untold, composite, TIER)
    assert place.predicted() == {}
    assert place.scores() == pytest.approx([(3 * 0.8 + 0) / 4, (3 * 0.4 + 0.5) / 4])


# -- latency-scorer


def test_without_an_slo_the_shortest_times_score_best() -> None:
    scores = Place(fleet(tokens=[30_000, 10_000, 60_000], requests=[1, 1, 1]), STREAMING, SCORER).scores()
    assert scores[1] > scores[0] > scores[2]
    assert scores[1] == pytest.approx(1.0)
    assert scores[2] == pytest.approx(0.01)


def test_an_idle_endpoint_comes_before_all_that_break_the_promise() -> None:
    scores = Place(fleet(tokens=[30_000, 90_000], requests=[1, 0]), STREAMING, SCORER).scores()
    assert scores[0] == 0.0
    assert scores[1] > 0.0


def both(**headers: str) -> tuple[list[float], list[float]]:
    """The scores of both strategies over three queues: 1, 2.5 and 5 s."""
    queues: dict[str, Any] = {"tokens": [12_000, 30_000, 60_000], "requests": [1, 1, 1]}
    most = {"type": SCORER, "parameters": {"headroomSelectionStrategy": "most"}}
    return Place(fleet(**queues), STREAMING, SCORER).scores(**headers), Place(
        fleet(**queues), STREAMING, most
    ).scores(**headers)


def test_least_fills_up_those_near_the_promise_and_most_spares_them() -> None:
    least, most = both(x_llm_d_slo_ttft_ms="3500", x_llm_d_slo_tpot_ms="500")
    assert least[1] > least[0] > 0.0 == least[2]
    assert most[0] > most[1] > 0.0 == most[2]


def test_where_none_keeps_the_promise_both_take_the_nearest() -> None:
    least, most = both(x_llm_d_slo_ttft_ms="500", x_llm_d_slo_tpot_ms="500")
    assert least == most
    assert least[0] > least[1] > least[2]


def test_to_miss_the_tpot_is_milder_than_to_miss_the_ttft() -> None:
    place = Place(fleet(tokens=[12_000, 60_000], requests=[90, 1]), STREAMING, SCORER)
    step_s = [known.tpot_s for known in place.predicted().values()]
    between = f"{1000 * (step_s[0] + step_s[1]) / 2}"
    scores = place.scores(x_llm_d_slo_ttft_ms="3000", x_llm_d_slo_tpot_ms=between)
    assert scores[0] > 0.0 == scores[1]


def test_a_weight_of_nothing_counts_nothing() -> None:
    by_tpot = {"type": SCORER, "parameters": {"ttftWeight": 0, "tpotWeight": 2}}
    scores = Place(fleet(tokens=[60_000, 0], requests=[1, 40]), STREAMING, by_tpot).scores()
    assert scores[0] > scores[1]


# -- slo-headroom-tier-filter

QUEUES: dict[str, Any] = {"tokens": [60_000, 12_000, 0], "requests": [1, 1, 1]}


def tier(explore: float, **fields: Any) -> Counter[str]:
    explored = {"type": TIER, "parameters": {"epsilonExploreNeg": explore}}
    place = Place(fleet(**QUEUES), STREAMING, explored, "random-picker")
    return Counter(place.send(**fields) for _ in range(300))


def test_only_who_keeps_the_promise_stays() -> None:
    assert set(tier(0.0, headers={TTFT: "3000"})) == {"e1", "e2"}


def test_some_requests_see_how_the_others_are() -> None:
    seen = tier(0.1, headers={TTFT: "3000"})
    assert 10 < seen["e0"] < 60


@pytest.mark.parametrize("headers", [{}, {TTFT: "1"}, {TTFT: "60000"}])
def test_all_stay_where_nothing_is_promised_or_all_are_alike(headers: dict[str, str]) -> None:
    assert set(tier(0.0, headers=headers)) == {"e0", "e1", "e2"}


# -- prefix-cache-affinity-filter with the predictor


def affinity(tokens: list[int], **parameters: Any) -> list[str]:
    """Who is left of two endpoints of which the first holds the prompt."""
    given = {"ttftSource": "latencyPredictor", "maxTTFTPenaltyMs": 2000, **parameters}
    spec = {"type": "prefix-cache-affinity-filter", "parameters": given}
    place = Place(fleet(tokens=tokens), spec, STREAMING, "random-picker")
    match = place.services.prefix.match(request(PROMPT))
    place.services.prefix.insert(0, match.chains)
    chosen = {place.send(text=PROMPT) for _ in range(40)}
    return sorted(chosen)


def test_affinity_holds_until_the_predicted_wait_is_more_than_the_penalty() -> None:
    assert affinity([20_000, 0]) == ["e0"]  # 1.7 s
    assert "e1" in affinity([40_000, 0])
    assert affinity([40_000, 0], maxTTFTPenaltyMs=0) == ["e0"]


def test_affinity_adds_the_producer_it_needs_and_only_then() -> None:
    def types(**parameters: Any) -> set[str]:
        made = loaded({"type": "prefix-cache-affinity-filter", "parameters": parameters})
        return {own_name(type(plugin)) for plugin in made.plugins}

    assert PRODUCER in types(ttftSource="latencyPredictor", peakPrefillThroughput=0)
    assert PRODUCER not in types()


# -- latency-slo-admitter

FULL: dict[str, Any] = {
    "tokens": [60_000, 30_000],
    "requests": [3, 2],
    "kv_usage": [0.5, 0.4],
    "at_s": [99.9, 99.9],
}


def admit(priority: int, headers: dict[str, str], **changes: Any) -> str:
    return Place(fleet(**(FULL | changes)), STREAMING, ADMITTER, "random-picker").send(
        priority=priority, headers=headers
    )


def test_what_can_wait_is_refused_where_nobody_can_keep_its_promise() -> None:
    with pytest.raises(Saturated, match="SLO") as refused:
        admit(-1, {TTFT: "1000"})
    assert (refused.value.status, refused.value.reason) == (429, "saturated")


@pytest.mark.parametrize(
    ("priority", "headers", "changes"),
    [
        (0, {TTFT: "1000"}, {}),
        (-1, {}, {}),
        (-1, {TTFT: "4000"}, {}),
        (-1, {TTFT: "1000"}, {"requests": [3, 0]}),
        (-1, {TTFT: "1000"}, {"kv_usage": [0.5, 0.01]}),
    ],
    ids=["no negative priority", "no promise", "one keeps it", "one is idle", "one is cold"],
)
def test_all_others_are_let_in(priority: int, headers: dict[str, str], changes: dict[str, Any]) -> None:
    assert admit(priority, headers, **changes) in ("e0", "e1")


def test_without_predictions_nobody_is_refused() -> None:
    untold = {"type": PRODUCER, "parameters": {"predictInProduce": False}}
    place = Place(fleet(**FULL), untold, ADMITTER, "random-picker")
    assert place.send(priority=-1, headers={TTFT: "1"}) in ("e0", "e1")


# -- configurations


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"samplingMean": 0}, "samplingMean"),
        ({"maxDecodeTokenSamplesForPrediction": -1}, "maxDecodeTokenSamplesForPrediction"),
        ({"sloBufferFactor": 0}, "sloBufferFactor"),
        ({"contextTTL": "soon"}, "not a duration"),
        ({"url": "http://localhost:8000"}, "url"),
    ],
)
def test_a_producer_that_makes_no_sense_stops(parameters: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        loaded({"type": PRODUCER, "parameters": parameters})


def test_what_only_the_sidecar_needs_is_accepted_and_said(caplog: pytest.LogCaptureFixture) -> None:
    parameters = {
        "samplingMean": 150,
        "maxDecodeTokenSamplesForPrediction": 30,
        "contextTTL": 300_000_000_000,
        "useEncoderCacheFeatures": True,
        "sloBufferFactor": 1.2,
    }
    with caplog.at_level(logging.WARNING):
        assert loaded({"type": PRODUCER, "parameters": parameters})
    said = [line for line in caplog.messages if "has no effect" in line]
    assert len(said) == 4
    assert not any("sloBufferFactor" in line for line in said)


@pytest.mark.parametrize("consumer", [SCORER, TIER, ADMITTER])
def test_consumers_bring_the_producer_and_may_name_it(consumer: str) -> None:
    assert PRODUCER in {own_name(type(plugin)) for plugin in loaded(consumer).plugins}
    by_name = {"type": consumer, "parameters": {"latencyPredictionInfoProducerName": "mine"}}
    assert loaded(by_name, {"type": PRODUCER, "name": "mine"})
    with pytest.raises(SettingsError, match="no predicted-latency-producer is called 'mine'"):
        loaded(by_name)


def test_a_profile_may_list_the_producer(caplog: pytest.LogCaptureFixture) -> None:
    uses = [{"pluginRef": PRODUCER}, {"pluginRef": SCORER}]
    tree = {
        "apiVersion": "llm-d.ai/v1alpha1",
        "kind": "EndpointPickerConfig",
        "plugins": [{"type": PRODUCER}, {"type": SCORER}],
        "schedulingProfiles": [{"name": "default", "plugins": uses}],
    }
    assert list(load_tree(tree, "test").profiles[0].weights) == [SCORER]
    assert f"{PRODUCER} runs for every request; in a profile it has no effect" in caplog.text


def test_llm_ds_guide_loads() -> None:
    plain = load_picker_config((CONFIGS / "predicted-latency.yaml").read_text())
    slo = load_picker_config((CONFIGS / "predicted-latency-slo.yaml").read_text())
    assert [name for name, _ in plain.profiles[0].filters] == ["loose-affinity-filter"]
    assert [name for name, _ in slo.profiles[0].filters] == [
        "strict-affinity-filter",
        TIER,
        "loose-affinity-filter",
    ]
    assert {PRODUCER, ADMITTER} <= {own_name(type(plugin)) for plugin in slo.plugins}


def test_on_unequal_accelerators_llm_ds_guide_gets_more_out_of_the_pool_than_its_blend() -> None:
    scenario = msgspec.structs.replace(
        load_scenario(
            None,
            [
                "engines=[{accelerator: h100-nvl, count: 1}, {accelerator: mi325x, count: 2}, "
                "{accelerator: gaudi3, count: 2}]",
                "workload.groups=24",
                "workload.output_len=400",
                "stages=[{rate: 8, duration_s: 40}, {rate: 30, duration_s: 20}]",
            ],
        )
    )

    def output_tok_s(name: str) -> float:
        run = Simulation(scenario, policy(name)).run()[-1]
        return sum(r.usage.output_tokens or 0 for r in run.records) / (run.end_s - run.start_s)

    assert output_tok_s(str(CONFIGS / "predicted-latency.yaml")) > 1.15 * output_tok_s("llm-d-blend")
