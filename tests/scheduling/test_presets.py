"""The named policies: what each does to a stream of requests."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from msgspec.structs import replace

from pointsman.config import load
from pointsman.errors import SettingsError
from pointsman.proxy.core import policy_of
from pointsman.registry import build
from pointsman.router import Flight
from pointsman.scheduling.presets import DEFAULT, PRESETS, build_scheduler, load_policy
from pointsman.scheduling.scheduler import Scheduler
from pointsman.scheduling.underway import UnderWay
from pointsman.testing import fleet, request, services
from pointsman.types import Decision, Ending, Endpoint, Load, Outcome, Usage


def scheduler(preset: str, pool: Sequence[Endpoint], *, seed: int = 0, **options: Any) -> Scheduler:
    given = services(seed=seed, clock=lambda: 100.0)
    for endpoint in pool:
        given.prefix.add(endpoint.slot)
    return build_scheduler(load_policy(preset, **options), given)


def send(made: Scheduler, pool: Sequence[Endpoint], text: str = "", **fields: Any) -> Decision:
    """Schedule, and count the request as in flight from then on."""
    asked = request(text, **fields)
    return Flight(asked, made.schedule(asked, pool)).decision


def prompts(n: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [rng.randbytes(1000).hex() for _ in range(n)]


def shares(decisions: Sequence[Decision]) -> list[int]:
    counts = Counter(d.chosen.name for d in decisions)
    return [counts[name] for name in sorted(counts)]


@pytest.mark.parametrize("preset", PRESETS)
def test_one_seed_gives_one_decision_log(preset: str) -> None:
    def run(seed: int) -> list[Any]:
        pool = fleet(7, weight=[1.0, 2.0, 1.0, 1.0, 3.0, 1.0, 1.0])
        made = scheduler(preset, pool, seed=seed)
        texts = prompts(20) * 3
        return [(d.chosen.name, d.scores, d.matched_tokens) for d in (send(made, pool, t) for t in texts)]

    assert run(1) == run(1)


@pytest.mark.parametrize(
    "preset", ["llm-d-affinity", "llm-d-blend", "random", "least-request", "power-of-two"]
)
def test_another_seed_gives_another(preset: str) -> None:
    def run(seed: int) -> list[str]:
        pool = fleet(7)
        made = scheduler(preset, pool, seed=seed)
        return [send(made, pool, text).chosen.name for text in prompts(40)]

    assert run(1) != run(2)


@pytest.mark.parametrize(
    "preset",
    [
        *(
            "llm-d-affinity",
            "llm-d-blend",
            "least-request",
            "power-of-two",
            "cache-aware",
            "dynamo",
            "lmetric",
        ),
        *("static-capacity", "learned-capacity", "pool-latency-predictor", "ttft-predictor"),
    ],
)
def test_cold_prompts_spread_over_a_cold_pool(preset: str) -> None:
    pool = fleet(10)
    made = scheduler(preset, pool)
    got = shares([send(made, pool, text) for text in prompts(200)])
    assert len(got) == 10
    assert max(got) <= 2.5 * 200 / 10


def test_affinity_levels_uncached_tokens() -> None:
    pool = fleet(10)
    made = scheduler("llm-d-affinity", pool)
    assert shares([send(made, pool, text) for text in prompts(200)]) == [20] * 10


@pytest.mark.parametrize(
    "preset", ["llm-d-affinity", "llm-d-blend", "consistent-hash", "cache-aware", "cache-aware-vllm-router"]
)
def test_a_prompt_returns_to_where_it_was(preset: str) -> None:
    pool = fleet(10)
    made, texts = scheduler(preset, pool), prompts(30)
    first = [send(made, pool, text).chosen.name for text in texts]
    again = [send(made, pool, text) for text in texts]
    assert [d.chosen.name for d in again] == first
    assert all(d.matched_tokens == d.prompt_tokens for d in again)


def test_affinity_leaves_an_overloaded_home() -> None:
    pool = fleet(3)
    made, (text,) = scheduler("llm-d-affinity", pool), prompts(1)
    home = send(made, pool, text).chosen
    home.load.tokens += 300_000
    assert send(made, pool, text).chosen is not home


@pytest.mark.parametrize(("preset", "slack"), [("round-robin", 0), ("random", 60)])
def test_weighted_shares(preset: str, slack: int) -> None:
    pool = fleet(weight=[1.0, 1.0, 2.0])
    made = scheduler(preset, pool)
    got = shares([send(made, pool) for _ in range(1000)])
    assert [abs(n - want) <= slack for n, want in zip(got, (250, 250, 500), strict=True)] == [True] * 3


@pytest.mark.parametrize(("preset", "slack"), [("least-request", 0), ("static-capacity", 1)])
def test_presets_that_fill_up_by_weight(preset: str, slack: int) -> None:
    pool = fleet(weight=[1.0, 1.0, 2.0])
    made = scheduler(preset, pool)
    for _ in range(400):
        send(made, pool)
    got = [e.load.requests for e in pool]
    assert all(abs(n - want) <= slack for n, want in zip(got, (100, 100, 200), strict=True)), got


@pytest.mark.parametrize("preset", PRESETS)
def test_sessions_stay_together_under_every_preset(preset: str) -> None:
    pool = fleet(6)
    made = scheduler(preset, pool, session_headers=["X-User"], session_cookies=["sid"])
    for session in ({"x-user": "u1"}, {"cookie": "a=b; sid=9"}):
        decisions = [send(made, pool, text, headers=session) for text in prompts(12, seed=len(session))]
        assert len({d.chosen.name for d in decisions}) == 1
    assert len({send(made, pool, text).chosen.name for text in prompts(60, seed=5)}) > 1


def test_consistent_hash_finds_a_session_again_after_a_restart() -> None:
    pool, options = fleet(30), {"session_headers": ["x-user"]}
    before = scheduler("consistent-hash", pool, **options)
    after = scheduler("consistent-hash", pool, seed=9, **options)
    for user in range(10):
        one, other = (
            send(made, pool, text, headers={"x-user": str(user)})
            for made, text in zip((before, after), prompts(2, seed=user), strict=True)
        )
        assert one.chosen is other.chosen


@pytest.mark.parametrize("preset", PRESETS)
def test_stale_or_missing_metrics_never_reject(preset: str) -> None:
    pool = fleet(requests=[3, 3], at_s=[0.0, 1.0])
    assert scheduler(preset, pool).schedule(request(priority=-1), pool)


def notes(made: Scheduler) -> list[UnderWay[Any]]:
    """Where the plugins keep what they note of requests under way."""
    return [kept for plugin in made.plugins for kept in vars(plugin).values() if isinstance(kept, UnderWay)]


NOTING = {"dynamo", "learned-capacity", "pool-latency-predictor", "ttft-predictor"}
"""Presets whose plugins learn from requests that end, or count them until then."""


@pytest.mark.parametrize("preset", PRESETS)
def test_nothing_is_left_of_requests_that_ended_in_any_way(preset: str) -> None:
    pool = fleet(4)
    made = scheduler(preset, pool)
    for i, ending in enumerate(list(Ending) * 5):
        asked = request("x" * 400 * i, stream=True)
        flight = Flight(asked, made.schedule(asked, pool))
        if i % 3 == 0:  # its endpoint fails and leaves, another takes the slot; it is sent again
            failed = flight.decision.chosen
            flight.release()
            pool = [e for e in pool if e is not failed]
            flight.board(made.schedule(asked, pool))
            pool.append(replace(failed, name=f"new{i}", load=Load()))
        assert sum(map(len, notes(made))) == (preset in NOTING)
        flight.release()
        outcome = Outcome(ending=ending, status=200, ttft_s=0.1, duration_s=i, usage=Usage(output_tokens=i))
        made.finish(asked, flight.decision, outcome)
    assert sum(map(len, notes(made))) == 0


def test_the_default_preset_exists() -> None:
    assert DEFAULT in PRESETS


def test_an_unknown_preset_comes_with_the_closest_known_one() -> None:
    with pytest.raises(SettingsError, match=r"unknown preset 'round-robbin'; did you mean round-robin\?"):
        load_policy("round-robbin")


def test_a_picker_configuration_has_session_affinity_of_its_own() -> None:
    with pytest.raises(SettingsError, match="session_headers"):
        load_policy(picker_config="", session_headers=["x-user"])


def test_any_parameter_and_weight_of_a_preset_can_be_changed() -> None:
    changes = {"prefix-cache-scorer": {"weight": 5, "matchLengthWeight": 0.5}, "max-score-picker": {}}
    (profile,) = load_policy("llm-d-blend", parameters=changes).profiles
    assert profile.weights == {
        "queue-scorer": 2.0,
        "kv-cache-utilization-scorer": 2.0,
        "prefix-cache-scorer": 5.0,
    }
    assert profile.scorers[2][2] == build("prefix-cache-scorer", {"matchLengthWeight": 0.5}, "test")
    assert load_policy("llm-d-blend").profiles[0].weights["prefix-cache-scorer"] == 3.0


def test_parameters_of_a_preset_are_settings() -> None:
    changes = ["scheduling.preset=llm-d-blend", "scheduling.parameters.queue-scorer.weight=7"]
    assert policy_of(load(None, changes)).profiles[0].weights["queue-scorer"] == 7.0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"queue-scorers": {}},
            r"it has no queue-scorers; did you mean queue-scorer\? \(it has queue-scorer, ",
        ),
        ({"token-load-scorer": {}}, "it has no token-load-scorer"),
        (
            {"prefix-cache-scorer": {"matchLenghtWeight": 1}},
            r"no parameter matchLenghtWeight; did you mean matchLengthWeight\? \(it has weight, ",
        ),
        ({"queue-scorer": {"limit": 1}}, r"no parameter limit \(it has weight\)"),
        ({"max-score-picker": {"weight": 1}}, r"no parameter weight \(it has maxNumOfEndpoints\)"),
        ({"queue-scorer": {"weight": "1"}}, r"queue-scorer\.weight: '1' is not a number"),
        (
            {"prefix-cache-scorer": {"matchLengthWeight": 2}},
            r"prefix-cache-scorer: .* at `\$\.matchLengthWeight`",
        ),
    ],
)
def test_a_parameter_that_cannot_be_set_is_named(changes: Any, said: str) -> None:
    with pytest.raises(SettingsError, match=rf"llm-d-blend: .*{said}"):
        load_policy("llm-d-blend", parameters=changes)


def test_parameters_of_a_picker_configuration_are_written_there() -> None:
    with pytest.raises(SettingsError, match=r"scheduling\.parameters"):
        load_policy(picker_config="", parameters={"queue-scorer": {"weight": 1}})
