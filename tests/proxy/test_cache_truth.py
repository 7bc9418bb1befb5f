"""Predicted against reported: sums, causes, and events that are set aside and tried again."""

from __future__ import annotations

import logging
import re
from array import array
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman.config import Endpoint as EndpointSettings
from pointsman.endpoints.pool import Pool
from pointsman.endpoints.target import targets_of
from pointsman.prefix.kv_source import KvEventSource
from pointsman.prefix.kv_wire import Stored
from pointsman.prefix.precise import PreciseIndex
from pointsman.proxy.cache_truth.causes import CAUSES, FEW, SILENT_S
from pointsman.proxy.cache_truth.counts import BLOCK, RECENT, Compared, Record
from pointsman.proxy.cache_truth.endpoint import CacheOf
from pointsman.proxy.cache_truth.observer import CacheTruth
from pointsman.proxy.cache_truth.trust import MAX_PAUSE_S, PAUSE_S
from pointsman.testing import request
from pointsman.types import Decision, Ending, Metrics, Outcome, Usage

BLOCK_TOKENS = 16
NAME = "a:8000"
SOURCE = KvEventSource(
    endpoint=NAME,
    rank=0,
    address="tcp://a:5557",
    replay="",
    connected=True,
    live=True,
    frames=1,
    events=1,
    blocks=1,
    last_event_s=0.0,
    gaps=0,
    replays=0,
    replays_failed=0,
    restarts=0,
    cleared=0,
    malformed=0,
    skipped=0,
)


class World:
    """One endpoint whose events have told of a block."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.pool = Pool(lambda: self.now_s)
        self.precise = PreciseIndex()
        self.sources = [SOURCE]
        self.truth = CacheTruth(self.pool, self.precise, lambda: self.sources, lambda: self.now_s)
        self.pool.add(targets_of(EndpointSettings(url="http://a:8000"))[0], "test")
        self.precise.add(0)
        ids = array("I", range(BLOCK_TOKENS)).tobytes()
        self.precise.apply(0, [Stored([1], None, ids, BLOCK_TOKENS)], self.now_s)
        self.truth.check()
        self.queries = self.hits = 0

    @property
    def cache(self) -> CacheOf:
        return self.truth.endpoints[NAME]

    def source(self, **fields: Any) -> None:
        self.sources = [KvEventSource(**(_fields(SOURCE) | fields))]

    def page(self, **fields: Any) -> None:
        """A metrics page arrives."""
        self.now_s += 1.0
        metrics = Metrics(at_s=self.now_s, prefix_queries=self.queries, prefix_hits=self.hits, **fields)
        self.pool.learn_metrics(NAME, "vllm", metrics, False)

    def ask(
        self,
        predicted: int,
        reported: int | None,
        *,
        sent: int | None = None,
        prompt: int = 1000,
        times: int = 1,
        counted: int | None = None,
        by_events: bool = True,
        ending: Ending = Ending.OK,
        tried: tuple[str, ...] = (),
        **fields: Any,
    ) -> None:
        """Requests that go there and end. ``counted``: tokens that we took the prompt for."""
        for _ in range(times):
            chosen = self.pool.members[NAME].endpoint
            decision = Decision(
                "r",
                "m",
                self.now_s,
                "p",
                [chosen],
                chosen,
                matched_tokens=predicted,
                prompt_tokens=prompt if counted is None else counted,
                by_events=by_events and 0 in self.precise.slots,
                sent_tokens=predicted if sent is None else sent,
                tried=tried,
            )
            usage = Usage(prompt, 1, reported)
            outcome = Outcome(ending=ending, status=200, endpoint=NAME, usage=usage)
            self.truth(request("x", **fields), decision, outcome)

    def warnings(self) -> dict[str, str]:
        self.truth.check()
        return {cause: says for cause, (_, says) in self.cache.warnings.items()}

    @property
    def believed(self) -> bool:
        return 0 in self.precise.slots


def _fields(source: KvEventSource) -> dict[str, Any]:
    return {name: getattr(source, name) for name in source.__struct_fields__}


@pytest.fixture
def world() -> World:
    return World()


class TestSums:
    def test_each_view_has_its_own_and_errors_do_not_cancel_out(self, world: World) -> None:
        world.ask(96, 96)
        world.ask(64, 96)
        world.ask(128, 96)
        world.ask(500, 400, by_events=False)
        events, sent = world.cache.events.total, world.cache.sent.total
        assert (events.requests, events.exact, events.prompt_tokens) == (3, 1, 3000)
        assert (events.predicted_tokens, events.reported_tokens, events.error_tokens) == (288, 288, 64)
        assert (sent.requests, sent.exact, sent.error_tokens) == (1, 0, 100)

    @pytest.mark.parametrize(
        "fields",
        [
            {"reported": None},
            {"ending": Ending.CANCELLED},
            {"ending": Ending.ERROR},
            {"tried": ("b:8000",)},
            {"n": 2},
            {"state_id": "resp_1"},
            {"prompts": request("x").prompts * 2},
        ],
    )
    def test_what_cannot_be_compared_is_left_out(self, world: World, fields: dict[str, Any]) -> None:
        world.ask(**{"predicted": 96, "reported": 0} | fields)
        assert world.cache.events.total.requests == 0
        world.ask(96, 0)
        assert world.cache.events.total.requests == 1

    def test_an_endpoint_that_has_left_is_forgotten(self, world: World) -> None:
        world.ask(0, 900, sent=900, times=RECENT)
        assert world.precise.suspended == {0}
        world.pool.remove(NAME)
        assert (world.truth.endpoints, world.precise.suspended) == ({}, frozenset())
        world.truth.check()

    @given(
        st.lists(
            st.builds(
                Compared,
                st.integers(0, 99),
                st.integers(0, 99),
                st.integers(0, 99),
                st.integers(1, 99),
                st.booleans(),
            ),
            max_size=3 * RECENT,
        )
    )
    def test_the_last_requests_are_the_last_requests(self, requests: list[Compared]) -> None:
        record = Record()
        for each in requests:
            record.add(each)
        last = requests[-RECENT:]
        assert record.requests == len(last)
        assert record.predicted_tokens == sum(r.predicted for r in last)
        assert record.reported_tokens == sum(r.reported for r in last)
        assert record.unlike == sum(not r.alike for r in last)
        prompt = sum(r.prompt for r in last) or 1
        assert record.error == sum(abs(r.predicted - r.reported) for r in last) / prompt
        assert record.sent_error == sum(abs(r.sent - r.reported) for r in last) / prompt


class TestTrust:
    def lie(self, world: World) -> None:
        """Until the events are set aside."""
        world.ask(0, 900, sent=900, times=RECENT)
        assert not world.believed

    def test_events_that_are_worse_than_what_was_sent_are_set_aside(
        self, world: World, caplog: pytest.LogCaptureFixture
    ) -> None:
        world.ask(0, 900, sent=880, times=RECENT - 1)
        assert world.believed
        world.ask(0, 900, sent=880)
        assert not world.believed
        assert "off by 90% of the prompt tokens" in world.cache.trust.reason
        assert "tried again after 60 s (events-set-aside)" in caplog.text
        assert list(world.warnings()) == ["events-set-aside"]
        assert caplog.text.count("WARNING") == 1

    @pytest.mark.parametrize(
        ("predicted", "sent"),
        [
            (850, 900),  # 5% off
            (0, 0),  # a burst: nobody could know
            (700, 680),  # both wrong
        ],
    )
    def test_events_that_are_no_worse_stay(self, world: World, predicted: int, sent: int) -> None:
        world.ask(predicted, 900, sent=sent, times=4 * RECENT)
        assert world.believed
        assert world.cache.trust.times == 0

    @pytest.mark.parametrize("wrong", [1, BLOCK])
    def test_wrong_predictions_that_pass_do_nothing(self, world: World, wrong: int) -> None:
        for _ in range(8):
            world.ask(0, 900, sent=900, times=wrong)
            world.ask(900, 900, times=BLOCK)
        assert world.believed

    def test_they_are_tried_again_and_each_pause_is_twice_as_long(self, world: World) -> None:
        pauses = []
        for _ in range(6):
            self.lie(world)
            begin_s = world.now_s
            while not world.believed:
                world.now_s += 1
                world.truth.check()
            pauses.append(world.now_s - begin_s)
        assert pauses == [60, 120, 240, 480, 600, 600]
        world.now_s += MAX_PAUSE_S + 1  # they were right for so long
        self.lie(world)
        assert world.cache.trust.again_s - world.now_s == PAUSE_S

    def test_what_comes_after_they_were_set_aside_counts_for_what_was_sent(self, world: World) -> None:
        self.lie(world)
        world.ask(900, 900)
        assert world.cache.sent.total.requests == 1
        assert world.cache.events.total.requests == RECENT

    @pytest.mark.parametrize("how", ["emptied", "reconnected", "restarted"])
    def test_a_stream_that_begins_anew_is_tried_at_once_but_not_each_time(
        self, world: World, how: str
    ) -> None:
        def anew(i: int) -> None:
            if how == "emptied":
                world.precise.clear(0)
            else:
                world.source(**{"replays" if how == "reconnected" else "restarts": i})

        self.lie(world)
        world.truth.check()
        assert not world.believed
        anew(1)
        world.truth.check()
        assert world.believed
        self.lie(world)
        anew(2)
        world.truth.check()
        assert not world.believed  # not twice within the pause
        world.now_s += PAUSE_S
        world.truth.check()
        assert world.believed

    def test_requests_on_their_way_when_they_are_set_aside_do_nothing_more(self, world: World) -> None:
        self.lie(world)
        again_s = world.cache.trust.again_s
        world.precise.resume(0)  # decided before
        world.now_s += 1
        world.ask(0, 900, sent=900, times=2 * RECENT)
        assert (world.cache.trust.times, world.cache.trust.again_s) == (1, again_s)

    def test_a_request_a_minute_never_makes_them_flap(self, world: World) -> None:
        """A source that is wrong for good."""
        for _ in range(600):
            world.ask(0, 900, sent=900)
            world.now_s += 60.0
            world.truth.check()
        assert 2 <= world.cache.trust.times <= 600 / RECENT


class TestCounters:
    """Answers that do not say what was cached."""

    def serve(self, world: World, predicted: int, hits: int, sent: int = 0, times: int = RECENT) -> None:
        world.ask(predicted, None, sent=sent, times=times)
        world.queries += 1000 * times
        world.hits += hits * times
        world.page()
        world.truth.check()

    def begin(self, world: World) -> None:
        world.queries = 10
        world.page()
        world.truth.check()

    def test_the_engines_counters_stand_in(self, world: World) -> None:
        self.begin(world)
        self.serve(world, 900, 890, 700)
        found = world.cache.by_counters["events"]
        assert (found.requests, found.predicted_tokens, found.reported_tokens) == (RECENT, 28800, 28480)
        assert found.error_tokens == 320
        assert world.believed

    def test_events_that_they_contradict_are_set_aside(self, world: World) -> None:
        self.begin(world)
        self.serve(world, 900, 0, 0)
        assert not world.believed
        assert "28,800 tokens were predicted" in world.cache.trust.reason
        assert "nothing-cached" in world.warnings()

    def test_not_where_what_was_sent_says_the_same(self, world: World) -> None:
        self.begin(world)
        self.serve(world, 900, 100, 900)
        assert world.cache.by_counters["events"].error_tokens == 800 * RECENT
        assert world.believed

    def test_requests_of_others_make_them_useless(self, world: World) -> None:
        self.begin(world)
        world.queries += 50_000
        self.serve(world, 900, 0, 0)
        assert world.cache.by_counters == {}
        assert world.believed

    def test_an_engine_that_starts_anew_begins_a_new_span(self, world: World) -> None:
        self.begin(world)
        world.queries = world.hits = 0
        self.serve(world, 900, 0, 0, times=1)
        assert world.cache.by_counters == {}

    def test_what_is_under_way_is_no_error(self, world: World) -> None:
        world.pool.members[NAME].endpoint.load.requests = 1
        world.pool.members[NAME].endpoint.load.context_tokens = 1500
        self.begin(world)
        self.serve(world, 900, 890)
        assert world.cache.by_counters["events"].error_tokens == 0

    def test_a_request_that_failed_is_no_error(self, world: World) -> None:
        self.begin(world)
        world.ask(0, None, prompt=20_000, ending=Ending.CANCELLED)
        self.serve(world, 900, 890)
        assert world.cache.by_counters["events"].error_tokens == 0

    def test_the_page_must_be_younger_than_the_last_request(self, world: World) -> None:
        self.begin(world)
        world.queries += 1000 * RECENT
        world.page()
        world.now_s += 1
        world.ask(900, None, times=RECENT)
        world.truth.check()
        assert world.cache.by_counters == {}
        world.page()
        world.truth.check()
        assert world.cache.by_counters["events"].requests == RECENT

    def test_nothing_is_said_where_all_answers_tell(self, world: World) -> None:
        self.begin(world)
        world.ask(900, 900, times=RECENT)
        self.serve(world, 0, 0, times=0)
        assert world.cache.by_counters == {}


class TestCauses:
    def test_each_is_described(self) -> None:
        page = Path(__file__).parents[2] / "docs" / "concepts" / "cache-truth.md"
        warnings = page.read_text().partition("## Warnings")[2].partition("\n## ")[0]
        assert re.findall(r"^\| `([\w-]+)` \|", warnings, re.MULTILINE) == list(CAUSES)

    def test_a_healthy_endpoint_has_none(self, world: World) -> None:
        world.page(block_tokens=BLOCK_TOKENS, prefix_caching=True)
        world.ask(960, 960, times=2 * RECENT)
        assert world.warnings() == {}

    def test_a_warning_is_logged_once_and_so_is_its_end(
        self, world: World, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO)
        world.page(block_tokens=128)
        for _ in range(3):
            world.truth.check()
        assert caplog.text.count("WARNING") == caplog.text.count("(block-size)") == 1
        world.page(block_tokens=BLOCK_TOKENS)
        for _ in range(3):
            world.truth.check()
        assert caplog.text.count("block-size is over") == 1
        assert world.warnings() == {}

    def test_blocks_of_another_size(self, world: World) -> None:
        world.page(block_tokens=128)
        assert "blocks of 16 tokens, its metrics page of 128" in world.warnings()["block-size"]

    @pytest.mark.parametrize(
        ("fields", "says"),
        [
            ({"last_event_s": 0.0}, "any more"),
            ({"last_event_s": None, "frames": 0}, "kv_events.topic"),
            ({"last_event_s": None, "frames": 0, "connected": False}, "nobody answers at tcp://a:5557"),
            (
                {"last_event_s": None, "frames": 0, "connected": False, "address": ""},
                "has not connected to kv_events.bind",
            ),
        ],
    )
    def test_prompts_are_computed_and_no_events_come(
        self, world: World, fields: dict[str, Any], says: str
    ) -> None:
        world.source(**fields)
        world.ask(0, 0)
        assert world.warnings() == {}
        world.now_s += SILENT_S
        assert says in world.warnings()["no-events"]
        world.source(last_event_s=world.now_s)
        assert world.warnings() == {}

    def test_an_event_in_between_does_not_make_up_for_what_comes_later(self, world: World) -> None:
        world.ask(0, 0)
        world.now_s += 1
        world.source(last_event_s=world.now_s)
        world.now_s += 1
        world.ask(0, 0, times=3)
        assert world.warnings() == {}
        world.now_s += SILENT_S
        assert set(world.warnings()) == {"no-events"}

    def test_no_events_come_where_nothing_is_computed(self, world: World) -> None:
        world.source(last_event_s=0.0)
        world.ask(992, 992)
        world.ask(0, None, sent=992)  # it may well have had it
        world.now_s += SILENT_S
        assert world.warnings() == {}

    def test_an_event_after_the_decision_is_enough_though_the_answer_takes_long(self, world: World) -> None:
        decided_s = world.now_s
        world.ask(0, 0)
        world.source(last_event_s=decided_s + 0.01)
        world.now_s += 10 * SILENT_S
        assert world.warnings() == {}

    def test_prefix_caching_is_off(self, world: World) -> None:
        world.page(prefix_caching=False)
        world.ask(900, 0, times=FEW)
        world.now_s += SILENT_S
        assert set(world.warnings()) == {"prefix-caching-off"}

    @pytest.mark.parametrize("by_events", [True, False])
    def test_thousands_were_predicted_and_none_reported(self, world: World, by_events: bool) -> None:
        world.page(prefix_caching=True)
        world.ask(900, 0, times=FEW - 1, by_events=by_events)
        assert "nothing-cached" not in world.warnings()
        world.ask(900, 0, by_events=by_events)
        assert "7,200 prompt tokens were predicted" in world.warnings()["nothing-cached"]
        world.ask(900, 900, by_events=by_events)
        assert "nothing-cached" not in world.warnings()

    def test_another_tokenizer(self, world: World) -> None:
        world.ask(0, 0, counted=990, times=FEW)
        assert "8 of the last 8 requests" in world.warnings()["tokens-differ"]
        world.ask(900, 900, times=FEW)
        assert world.warnings() == {}

    def test_what_was_missed_is_told_for_a_minute(self, world: World) -> None:
        world.source(cleared=2, replays_failed=1, last_event_s=world.now_s)
        says = world.warnings()["events-lost"]
        assert "3 times" in says
        assert "offers no replays" in says
        world.now_s += 59
        assert "events-lost" in world.warnings()
        world.now_s += 2
        assert world.warnings() == {}

    def test_numbers_that_begin_anew_again_and_again(self, world: World) -> None:
        for restarts in (1, 2):
            world.source(restarts=restarts)
            assert world.warnings() == {}
        world.source(restarts=3)
        assert "two engines" in world.warnings()["events-renumbered"]

    def test_what_cannot_be_read(self, world: World) -> None:
        world.source(malformed=1, skipped=4)
        assert "5 KV events" in world.warnings()["events-unreadable"]

    @pytest.mark.parametrize(
        ("predicted", "reported", "says"),
        [(900, 0, "holds less than it tells"), (0, 900, "holds more than it tells")],
    )
    def test_the_direction_of_the_error_tells_something(
        self, world: World, predicted: int, reported: int, says: str
    ) -> None:
        world.ask(predicted, reported, sent=reported, times=RECENT)
        assert says in world.warnings()["events-set-aside"]

    def test_an_engine_that_has_restarted_is_not_judged_by_what_was_before(self, world: World) -> None:
        world.page(prefix_caching=True)
        world.ask(900, 0, times=FEW)
        assert world.warnings()
        world.pool.learn_metrics(NAME, "vllm", Metrics(at_s=world.now_s), True)
        assert world.warnings() == {}
