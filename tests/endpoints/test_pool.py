"""Who may take a request: by model, breaker and draining; and what the pool tells its listeners."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman.config import Breaker
from pointsman.config import Endpoint as Settings
from pointsman.endpoints.breaker import State
from pointsman.endpoints.pool import REFRESH_S, Pool
from pointsman.endpoints.target import Target, targets_of
from pointsman.errors import ModelNotFound, NoEndpoints
from pointsman.types import Endpoint, Metrics

Make = Callable[..., Target]


@pytest.fixture
def pool(clock: Callable[[], float], target: Make) -> Pool:
    """Endpoints a and b; nothing known of them."""
    made = Pool(clock, Breaker(faults=3, open_s=1.0, max_open_s=8.0))
    made.apply("settings", [target("a"), target("b")])
    return made


def names(pool: Pool, model: str = "") -> list[str]:
    return [endpoint.name for endpoint in pool.candidates(model)]


def endpoint(pool: Pool, name: str) -> Endpoint:
    return pool.members[name].endpoint


def serves(pool: Pool, name: str, *models: str) -> None:
    pool.learn_models(name, [{"id": model} for model in models])


class TestModels:
    def test_without_a_model_any_endpoint_will_do(self, pool: Pool) -> None:
        serves(pool, "a", "llama")
        assert names(pool) == ["a", "b"]

    def test_only_endpoints_that_serve_the_model_or_the_adapter(self, pool: Pool) -> None:
        serves(pool, "a", "llama", "my-lora")
        serves(pool, "b", "llama")
        assert names(pool, "llama") == ["a", "b"]
        assert names(pool, "my-lora") == ["a"]

    def test_a_model_nobody_serves_is_not_found_and_the_known_ones_are_named(self, pool: Pool) -> None:
        serves(pool, "a", "llama")
        serves(pool, "b", "qwen")
        with pytest.raises(ModelNotFound, match="llama, qwen"):
            pool.candidates("nope")

    def test_an_endpoint_that_has_not_told_its_models_gets_what_no_other_serves(self, pool: Pool) -> None:
        serves(pool, "a", "llama")
        assert names(pool, "llama") == ["a"]
        assert names(pool, "unheard-of") == ["b"]

    def test_models_learned_later_count_at_once(self, pool: Pool) -> None:
        serves(pool, "a", "llama")
        serves(pool, "b", "qwen")
        assert names(pool, "llama") == ["a"]
        serves(pool, "b", "qwen", "llama")
        assert names(pool, "llama") == ["a", "b"]
        assert pool.models() == ["llama", "qwen"]

    def test_invented_models_do_not_grow_memory(self, pool: Pool) -> None:
        for i in range(5000):
            pool.candidates(f"invented-{i}")
        assert len(pool._candidates) <= 1024


class TestDraining:
    def test_a_draining_endpoint_gets_nothing_new_and_resumes(self, pool: Pool) -> None:
        pool.drain("a")
        assert names(pool) == ["b"]
        pool.drain("a", False)
        assert names(pool) == ["a", "b"]

    def test_it_is_not_used_even_when_all_others_are_broken(self, pool: Pool) -> None:
        pool.drain("a")
        pool.unreachable("b")
        assert names(pool) == ["b"]

    def test_when_all_drain_there_is_no_endpoint(self, pool: Pool) -> None:
        pool.drain("a")
        pool.drain("b")
        with pytest.raises(NoEndpoints, match="all 2 are draining"):
            pool.candidates("")

    def test_an_empty_pool_has_none(self, clock: Callable[[], float]) -> None:
        with pytest.raises(NoEndpoints, match="empty"):
            Pool(clock).candidates("m")


class TestBreakers:
    def test_nobody_listening_takes_an_endpoint_out_at_once(self, pool: Pool) -> None:
        pool.unreachable("a")
        assert names(pool) == ["b"]

    def test_faults_take_it_out_answers_do_not(self, pool: Pool) -> None:
        for _ in range(10):
            pool.answered(endpoint(pool, "a"))
        assert names(pool) == ["a", "b"]
        for _ in range(3):
            pool.failed(endpoint(pool, "a"))
        assert names(pool) == ["b"]

    def test_one_probe_at_a_time_after_its_time(self, pool: Pool, clock) -> None:  # type: ignore[no-untyped-def]
        pool.unreachable("a")
        clock.now += 0.9
        assert names(pool) == ["b"]
        clock.now += 0.2
        assert names(pool) == ["a", "b"]
        pool.sent(endpoint(pool, "a"))
        assert names(pool) == ["b"]
        pool.abandoned(endpoint(pool, "a"))
        assert names(pool) == ["a", "b"]
        pool.sent(endpoint(pool, "a"))
        pool.answered(endpoint(pool, "a"))
        assert names(pool) == ["a", "b"]
        assert not pool.troubled

    def test_when_all_are_out_all_are_tried(self, pool: Pool) -> None:
        pool.unreachable("a")
        pool.unreachable("b")
        assert names(pool) == ["a", "b"]

    def test_an_endpoint_that_answers_its_page_again_may_be_tried_at_once(self, pool: Pool) -> None:
        pool.unreachable("a")
        pool.learn_metrics("a", "vllm", Metrics(), False)
        assert pool.members["a"].breaker.state is State.HALF_OPEN
        assert names(pool) == ["a", "b"]

    def test_a_metrics_page_does_not_excuse_failing_requests(self, pool: Pool) -> None:
        pool.reached("a")
        for _ in range(3):
            pool.failed(endpoint(pool, "a"))
        pool.learn_metrics("a", "vllm", Metrics(), False)
        assert names(pool) == ["b"]


class TestReady:
    def test_it_is_ready_when_an_endpoint_that_takes_requests_has_answered(self, pool: Pool) -> None:
        assert not pool.ready
        pool.reached("a")
        assert pool.ready
        pool.drain("a")
        assert not pool.ready
        pool.answered(endpoint(pool, "b"))
        assert pool.ready
        pool.unreachable("b")
        assert not pool.ready


class TestMembership:
    def test_apply_lets_new_ones_join_and_missing_ones_leave(self, pool: Pool, target: Make) -> None:
        heard: list[tuple[str, str]] = []
        pool.listen(lambda event, endpoint: heard.append((event, endpoint.name)))
        pool.apply("settings", [target("b"), target("c")])
        assert heard == [("left", "a"), ("joined", "c")]
        assert list(pool.members) == ["b", "c"]

    def test_equal_targets_stay_as_they_are(self, pool: Pool, target: Make) -> None:
        before = pool.members["a"]
        pool.apply("settings", [target("a"), target("b")])
        assert pool.members["a"] is before

    def test_a_changed_target_joins_anew(self, pool: Pool, target: Make) -> None:
        serves(pool, "a", "llama")
        pool.apply("settings", [target("a", weight=3.0), target("b")])
        assert endpoint(pool, "a").weight == 3.0
        assert endpoint(pool, "a").models is None

    def test_each_source_speaks_for_its_own_only(self, pool: Pool, target: Make) -> None:
        pool.add(target("c"), "admin")
        pool.apply("file", [target("d")])
        pool.apply("settings", [])
        assert list(pool.members) == ["c", "d"]

    def test_slots_are_reused_only_after_removal(self, pool: Pool, target: Make) -> None:
        assert [endpoint(pool, n).slot for n in "ab"] == [0, 1]
        pool.remove("a")
        assert pool.add(target("c"), "admin").endpoint.slot == 0
        assert pool.add(target("d"), "admin").endpoint.slot == 2

    def test_news_of_an_endpoint_that_left_do_not_reach_its_successor(self, pool: Pool, target: Make) -> None:
        old = endpoint(pool, "a")
        pool.remove("a")
        pool.add(target("c"), "admin")
        for _ in range(5):
            pool.failed(old)
        pool.learn_metrics("a", "vllm", Metrics(), False)
        pool.unreachable("a")
        assert names(pool) == ["b", "c"]

    @given(st.lists(st.sets(st.sampled_from("abcdef")), max_size=8))
    def test_after_any_history_the_pool_is_what_was_last_applied_with_distinct_slots(
        self, history: list[set[str]]
    ) -> None:
        pool = Pool(lambda: 0.0)
        for wanted in history:
            pool.apply("file", [targets_of(Settings(url=f"http://{n}:1", name=n))[0] for n in sorted(wanted)])
            assert set(pool.members) == wanted
            slots = [member.endpoint.slot for member in pool.members.values()]
            assert len(set(slots)) == len(slots)
            assert all(slot < 6 for slot in slots)


class TestMetrics:
    def test_news_become_visible_within_the_refresh_time(self, pool: Pool, clock) -> None:  # type: ignore[no-untyped-def]
        pool.candidates("")
        pool.learn_metrics("a", "vllm", Metrics(at_s=1.0, waiting=7.0), False)
        clock.now += REFRESH_S * 1.1
        assert pool.candidates("")[0].metrics.waiting == 7.0

    def test_load_survives_every_new_snapshot(self, pool: Pool) -> None:
        load = endpoint(pool, "a").load
        pool.learn_metrics("a", "vllm", Metrics(), False)
        serves(pool, "a", "llama")
        assert endpoint(pool, "a").load is load

    def test_listeners_hear_of_restarts_and_of_new_cache_sizes(self, pool: Pool) -> None:
        heard: list[tuple[str, str, int]] = []
        pool.listen(lambda event, e: heard.append((event, e.name, e.metrics.kv_blocks)))
        pool.learn_metrics("a", "vllm", Metrics(block_tokens=16, kv_blocks=10), False)
        pool.learn_metrics("a", "vllm", Metrics(block_tokens=16, kv_blocks=10), False)
        pool.learn_metrics("a", "vllm", Metrics(block_tokens=16, kv_blocks=10), True)
        pool.learn_metrics("a", "vllm", Metrics(block_tokens=16, kv_blocks=20), False)
        assert heard == [("cache", "a", 10), ("restarted", "a", 10), ("cache", "a", 20)]

    def test_an_endpoint_that_went_away_is_told_once_as_restarted(self, pool: Pool) -> None:
        pool.reached("a")
        heard: list[tuple[str, str]] = []
        pool.listen(lambda event, e: heard.append((event, e.name)))
        pool.unreachable("a")
        pool.unreachable("a")
        assert heard == [("restarted", "a")]
