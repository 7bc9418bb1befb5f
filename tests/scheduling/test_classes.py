"""Requests with limits, background work, and the cheapest endpoint that keeps what was promised."""

from __future__ import annotations

import random
from collections.abc import Mapping
from math import inf
from typing import Any

import pytest

from pointsman.config import RequestClass as ClassSettings
from pointsman.config import Scheduling, load
from pointsman.errors import SettingsError
from pointsman.prefix.approximate import PrefixIndex
from pointsman.proxy.core import policy_of
from pointsman.scheduling.classes import Aim, Aims, RequestClass, parameters
from pointsman.scheduling.cycle import Services
from pointsman.scheduling.pickers.least_cost import LeastCost
from pointsman.scheduling.presets import build_scheduler, load_policy
from pointsman.testing import fleet, request
from pointsman.types import Decision, Ending, Endpoint, InferenceRequest, Outcome, Usage

PROMPT = "once upon a time there was a long prompt " * 100
PROMPT_TOKENS = 1025
OBJECTIVE = "x-llm-d-inference-objective"
TIGHT = {"x-llm-d-slo-tpot-ms": "15"}
"""Half as much again as a step of an endpoint at rest of which nothing is known."""


def busy(endpoint: Endpoint, requests: int) -> None:
    """So many requests are in flight there."""
    load = endpoint.load
    load.requests, load.context_tokens = requests, requests * PROMPT_TOKENS
    load.sent += 1
    load.changes += 1


class Place:
    """A scheduler over endpoints that have so many ``requests``, and a clock to turn."""

    def __init__(
        self,
        requests: list[int],
        classes: Mapping[str, Any] | None = None,
        objective: str = "seconds",
        **columns: Any,
    ) -> None:
        self.now_s = 100.0
        self.endpoints = fleet(len(requests), **columns)
        for endpoint, count in zip(self.endpoints, requests, strict=True):
            busy(endpoint, count)
        services = Services(PrefixIndex(), lambda: self.now_s, random.Random(0))
        for endpoint in self.endpoints:
            services.prefix.add(endpoint.slot)
        given = {"classes": classes or {"batch": {"background": True}}, "objective": objective}
        policy = load_policy("least-cost", parameters={"least-cost-picker": given})
        self.scheduler = build_scheduler(policy, services)
        (self.picker,) = [p for p in self.scheduler.plugins if isinstance(p, LeastCost)]
        self.sent = 0

    def send(self, objective: str = "", **headers: str) -> tuple[InferenceRequest, Decision]:
        self.sent += 1
        given = headers | ({OBJECTIVE: objective} if objective else {})
        made = request(f"{self.sent} {PROMPT}", id=str(self.sent), headers=given, stream=True)
        return made, self.scheduler.schedule(made, self.endpoints)

    def goes(self, objective: str = "", **headers: str) -> str:
        made, decision = self.send(objective, **headers)
        self.end(made, decision)
        return decision.chosen.name

    def end(self, made: InferenceRequest, decision: Decision, tpot_s: float = 0.012) -> None:
        usage = Usage(output_tokens=101)
        outcome = Outcome(
            ending=Ending.OK, status=200, usage=usage, ttft_s=0.5, duration_s=0.5 + 100 * tpot_s
        )
        self.scheduler.finish(made, decision, outcome)

    def later(self, seconds: float) -> None:
        """Time in which background work comes now and then."""
        for _ in range(int(seconds)):
            self.now_s += 1
            self.goes("batch")


CLASSES = {"chat": RequestClass(ttft_ms=500, tpot_ms=50), "batch": RequestClass(background=True)}


class TestAims:
    def aim(self, priority: int = 0, **headers: str) -> Aim | None:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return Aims(CLASSES).of(request(headers=named, priority=priority))

    def test_a_class_is_named_by_the_objective_in_either_spelling(self) -> None:
        chat = Aim(0.5, 0.05)
        assert self.aim(x_llm_d_inference_objective="chat") == chat
        assert self.aim(x_gateway_inference_objective="chat") == chat
        assert self.aim(x_llm_d_inference_objective="batch") == Aim(background=True)

    def test_nothing_is_aimed_at_for_others(self) -> None:
        assert self.aim() is None
        assert self.aim(x_llm_d_inference_objective="unheard-of") is None
        assert self.aim(x_llm_d_slo_ttft_ms="soon") is None

    def test_the_requests_own_limits_come_first_one_by_one(self) -> None:
        named = {"x_llm_d_inference_objective": "chat"}
        assert self.aim(**named, x_llm_d_slo_tpot_ms="20") == Aim(0.5, 0.02)
        assert self.aim(x_slo_ttft_ms="200") == Aim(ttft_s=0.2)

    def test_a_negative_priority_is_background(self) -> None:
        assert self.aim(priority=-1) == Aim(background=True)
        assert self.aim(priority=1) is None

    def test_the_default_class_is_that_of_all_others(self) -> None:
        aims = Aims(CLASSES | {"default": RequestClass(tpot_ms=80)})
        assert aims.of(request()) == Aim(inf, 0.08)
        assert aims.of(request(headers={OBJECTIVE: "unheard-of"})) == Aim(inf, 0.08)
        assert aims.of(request(headers={OBJECTIVE: "batch"})) == Aim(background=True)


class TestBackground:
    def test_it_goes_where_it_costs_least_while_nothing_was_promised(self) -> None:
        assert {Place([30, 60]).goes("batch") for _ in range(5)} == {"e0"}

    def test_it_is_kept_from_where_a_token_would_then_take_longer_than_promised(self) -> None:
        place = Place([0, 60])
        _, decision = place.send(**TIGHT)
        assert decision.chosen.name == "e0"
        busy(place.endpoints[0], 5)
        assert place.goes("batch") == "e0", "there is room for more"
        busy(place.endpoints[0], 30)
        assert place.goes("batch") == "e1"
        assert place.goes() == "e0", "a request without a class is nobody's background"

    def test_it_may_come_back_some_time_after_the_promise_was_kept(self) -> None:
        place = Place([0, 60])
        place.end(*place.send(**TIGHT))
        busy(place.endpoints[0], 30)
        place.later(120)
        assert place.goes("batch") == "e0"

    def test_where_every_place_would_break_promises_it_breaks_the_fewest(self) -> None:
        place = Place([0, 90])
        for _ in range(3):
            assert place.send(**TIGHT)[1].chosen.name == "e0"
        busy(place.endpoints[1], 0)
        busy(place.endpoints[0], 90)
        assert place.send(**TIGHT)[1].chosen.name == "e1"
        busy(place.endpoints[0], 30)
        busy(place.endpoints[1], 31)
        assert place.goes("batch") == "e1"

    def test_it_does_not_make_a_first_token_late_that_was_promised(self) -> None:
        place = Place([0, 60])
        place.send(**{"x-llm-d-slo-ttft-ms": "400"})
        place.endpoints[0].load.tokens = 4000
        busy(place.endpoints[0], 1)
        assert place.goes("batch") == "e1"

    def test_a_promise_that_nobody_can_keep_binds_nobody(self) -> None:
        place = Place([30, 60])
        place.send(**{"x-llm-d-slo-tpot-ms": "1"})
        assert place.goes("batch") == "e0"

    def test_a_looser_promise_does_not_break_a_tighter_one(self) -> None:
        place = Place([0, 60])
        place.send(**TIGHT)
        busy(place.endpoints[0], 30)
        assert place.goes(**{"x-llm-d-slo-tpot-ms": "100"}) == "e1"

    def test_nothing_is_kept_of_requests_that_are_over(self) -> None:
        place = Place([0, 60])
        promises = place.picker._promises
        sent = [place.send(**TIGHT) for _ in range(5)]
        refused, _ = sent[0]
        again = place.scheduler.schedule(refused, place.endpoints[1:])
        assert {slot: there.count for slot, there in promises._there.items()} == {0: 4, 1: 1}
        for made, decision in [(refused, again), *sent[1:]]:
            place.end(made, decision)
        assert len(promises.under_way) == 0
        assert promises._there == {}


PRICES = {"price_per_hour": [4.0, 1.0], "watts": [300.0, 900.0]}


class TestObjective:
    def test_the_cheapest_that_keeps_the_promise(self) -> None:
        loose = {"x-llm-d-slo-tpot-ms": "100"}
        assert Place([10, 10], **PRICES).goes(**loose) in ("e0", "e1")
        assert Place([10, 10], objective="price", **PRICES).goes(**loose) == "e1"
        assert Place([10, 10], objective="energy", **PRICES).goes(**loose) == "e0"
        assert Place([10, 60], objective="price", **PRICES).goes(**TIGHT) == "e0", "the other is too slow"

    def test_an_endpoint_in_use_is_filled_before_an_idle_one_is_begun(self) -> None:
        equal = {"price_per_hour": [2.0, 2.0]}
        loose = {"x-llm-d-slo-tpot-ms": "100"}
        assert {Place([0, 20], objective="price", **equal).goes(**loose) for _ in range(5)} == {"e1"}
        assert Place([0, 20], **equal).goes(**loose) == "e0"

    def test_background_work_is_placed_by_price_too(self) -> None:
        assert Place([10, 10], objective="price", **PRICES).goes("batch") == "e1"

    def test_what_is_promised_nothing_goes_by_seconds(self) -> None:
        assert Place([10, 30], objective="price", **PRICES).goes() == "e0"

    def test_where_no_promise_can_be_kept_seconds_decide(self) -> None:
        place = Place([90, 60], objective="price", price_per_hour=[1.0, 9.0])
        assert place.goes(**TIGHT) == "e1"

    def test_an_endpoint_without_a_price_leaves_the_choice_to_seconds(self) -> None:
        place = Place([10, 30], objective="price", price_per_hour=[4.0, 0.0])
        assert place.goes("batch") == "e0"

    def test_a_cheap_endpoint_that_makes_requests_wait_is_not_cheap(self) -> None:
        place = Place([10, 10], objective="price", waiting=[0.0, 3.0], **PRICES)
        assert place.goes("batch") == "e0"


class TestSettings:
    def test_classes_and_objective_reach_the_picker(self) -> None:
        text = ["scheduling.classes={chat: {ttft_ms: 500, tpot_ms: 50}, batch: {background: true}}"]
        policy = policy_of(load(None, [*text, "scheduling.objective=price"]))
        (picker,) = [p for p in policy.plugins if isinstance(p, LeastCost)]
        assert picker.classes["chat"] == RequestClass(ttft_ms=500, tpot_ms=50)
        assert picker.classes["batch"].background
        assert picker.objective == "price"

    def test_without_them_the_parameters_are_as_they_were(self) -> None:
        given = {"queue-scorer": {"weight": 7}}
        assert parameters(Scheduling(parameters=given)) is given

    @pytest.mark.parametrize(("key", "value"), [("preset", "llm-d-blend"), ("picker_config", "epp.yaml")])
    def test_other_policies_know_no_classes(self, key: str, value: str) -> None:
        classes = {"batch": ClassSettings(background=True)}
        with pytest.raises(SettingsError, match=r"scheduling\.classes: of the preset least-cost only"):
            parameters(Scheduling(classes=classes, **{key: value}))

    def test_a_misspelt_limit_is_named(self) -> None:
        with pytest.raises(SettingsError, match="classes"):
            load(None, ["scheduling.classes={chat: {ttft: 500}}"])
