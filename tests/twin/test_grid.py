"""Ranking on made-up runs whose order is known, and names that lead back to their policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman.bench.run import Load
from pointsman.bench.workloads import SharedPrefix
from pointsman.errors import SettingsError
from pointsman.sim.spec import FleetItem
from pointsman.twin.compare import Run, Task, simulate
from pointsman.twin.grid import Ranking, axis, points, rank
from pointsman.twin.policies import policy
from pointsman.twin.scenario import Scenario

SMALL = Scenario(
    engines=(FleetItem(count=2),),
    workload=SharedPrefix(groups=2, prompts_per_group=1, system_prompt_len=32, question_len=8, output_len=4),
    stages=(Load(rate=5, duration_s=1),),
    warm_up_stages=0,
)
BLEND = policy("llm-d-blend")
WEIGHTS = axis("queue-scorer.weight=1,5")
Each = Callable[[Callable[[Task], Run], Sequence[Task]], list[Run]]


def made_up(tok_s: Callable[[str, int], float], asked: list[tuple[str, int]]) -> Each:
    """Runs whose throughput depends on policy and seed as told."""
    template = simulate(Task(scenario=SMALL, policy=BLEND, seed=0))

    def each(_: Callable[[Task], Run], tasks: Sequence[Task]) -> list[Run]:
        runs = []
        for task in tasks:
            asked.append((task.policy.name, task.seed))
            stage = template.stages[0]
            changed = type(stage)(
                **{name: getattr(stage, name) for name in stage.__struct_fields__}
                | {"output_tok_s": tok_s(task.policy.name, task.seed)}
            )
            runs.append(Run(policy=task.policy.name, seed=task.seed, stages=(changed,), spreads=()))
        return runs

    return each


def ranking(tok_s: Callable[[str, int], float], asked: list[tuple[str, int]] | None = None) -> Ranking:
    each = made_up(tok_s, asked if asked is not None else [])
    return rank({"": SMALL}, [BLEND], [WEIGHTS], [0, 1], "output-tok-s", each)


def test_points_are_the_policy_as_it_is_and_all_combinations() -> None:
    found = points(BLEND, [WEIGHTS, axis("prefix-cache-scorer.weight=2,3.5")])
    assert [point.name for point in found] == [
        "llm-d-blend",
        "llm-d-blend:queue-scorer.weight=1,prefix-cache-scorer.weight=2",
        "llm-d-blend:queue-scorer.weight=1,prefix-cache-scorer.weight=3.5",
        "llm-d-blend:queue-scorer.weight=5,prefix-cache-scorer.weight=2",
        "llm-d-blend:queue-scorer.weight=5,prefix-cache-scorer.weight=3.5",
    ]
    (profile,) = policy(found[-1].name).load().profiles
    assert profile.weights == {
        "queue-scorer": 5, "kv-cache-utilization-scorer": 2, "prefix-cache-scorer": 3.5,
    }  # fmt: skip


def test_the_best_is_first_and_its_margin_is_told_on_seeds_that_did_not_choose_it() -> None:
    asked: list[tuple[str, int]] = []

    def tok_s(name: str, seed: int) -> float:
        luck = {0: 1.0, 1: 2.0}.get(seed, 3.0)  # common to all: it does not blur the margin
        return luck * {"llm-d-blend": 100, "llm-d-blend:queue-scorer.weight=1": 110}.get(name, 50)

    found = ranking(tok_s, asked)
    assert [point.policy.name for point in found.points] == [
        "llm-d-blend:queue-scorer.weight=1", "llm-d-blend", "llm-d-blend:queue-scorer.weight=5",
    ]  # fmt: skip
    assert found.points[0].score.mean == pytest.approx(1.0)
    assert found.points[1].score.mean == pytest.approx(100 / 110)
    over_itself, over_second = found.margins
    assert over_itself.fresh
    assert over_itself.better.mean == pytest.approx(0.1)
    assert over_itself.better.ci95 == pytest.approx(0.0, abs=1e-9)
    assert not over_second.fresh
    assert {seed for _, seed in asked[-4:]} == {2, 3}


def test_a_policy_that_is_best_as_it_is_has_a_margin_over_the_second_only() -> None:
    found = ranking(lambda name, seed: 100 if name == "llm-d-blend" else 80)
    (margin,) = found.margins
    assert found.points[0].policy is BLEND
    assert margin.better.mean == pytest.approx(0.25)


def test_where_less_is_better_the_least_is_first() -> None:
    seconds = iter([0.4, 0.2, 0.8])
    template = simulate(Task(scenario=SMALL, policy=BLEND, seed=0)).stages[0]
    assert template.ttft is not None
    ttft = type(template.ttft)

    def each(_: Callable[[Task], Run], tasks: Sequence[Task]) -> list[Run]:
        runs = []
        for task in tasks:
            p99 = next(seconds, 0.4)
            fields = {name: getattr(template, name) for name in template.__struct_fields__}
            stage = type(template)(**fields | {"ttft": ttft(1, p99, p99, p99, p99, p99)})
            runs.append(Run(policy=task.policy.name, seed=task.seed, stages=(stage,), spreads=()))
        return runs

    found = rank({"": SMALL}, [BLEND], [WEIGHTS], [0], "ttft-p99", each)
    assert [next(iter(point.values.values())).mean for point in found.points] == [0.2, 0.4, 0.8]
    assert [point.score.mean for point in found.points] == pytest.approx([1.0, 0.5, 0.25])


@given(
    st.dictionaries(
        st.sampled_from(["queue-scorer.weight", "prefix-cache-scorer.weight"]),
        st.floats(0, 1e6) | st.integers(0, 100),
    )
)
def test_a_name_leads_back_to_its_policy(settings: dict[str, float]) -> None:
    found = BLEND.having(settings)
    assert policy(found.name) == found


@pytest.mark.parametrize("text", ["queue-scorer.weight", "queue-scorer.weight=", "weight=1", "a.b=[1"])
def test_a_grid_that_cannot_be_read_is_the_users_mistake(text: str) -> None:
    with pytest.raises(SettingsError, match="--grid"):
        axis(text)
