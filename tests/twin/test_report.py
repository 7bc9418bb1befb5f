"""What a stage amounts to, against values worked out by hand and what the engines themselves count."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import fmean

import msgspec
import pytest

from pointsman.bench.report import Slo
from pointsman.bench.run import Load
from pointsman.bench.workloads import SharedPrefix, SloClasses
from pointsman.sim.spec import FleetItem
from pointsman.twin.compare import METRICS, Run, Task, metric, simulate, summarise_runs
from pointsman.twin.gateway import Served
from pointsman.twin.policies import policy
from pointsman.twin.report import Figures, figures
from pointsman.twin.run import ServerFigures, Simulation, StageRun
from pointsman.twin.scenario import Scenario
from pointsman.twin.tables import comparison
from pointsman.types import Usage

SLO = Slo(ttft_s=1.0, tpot_s=0.1)


def served(endpoint: str = "a", **fields: object) -> Served:
    """Due at 0, first token after half a second, eleven tokens by 1.5 s."""
    defaults: dict[str, object] = {
        "due_s": 0.0,
        "sent_s": 0.0,
        "first_s": 0.5,
        "last_s": 1.5,
        "end_s": 1.5,
        "events": 11,
        "status": 200,
        "usage": Usage(100, 11, 60),
        "matched_tokens": 64,
        "group": 0,
        "tries": 1,
    }
    return Served(endpoint=endpoint, **defaults | fields)


def server(name: str = "a", accelerator: str = "h100-nvl", **fields: object) -> ServerFigures:
    defaults: dict[str, object] = {
        "output_tokens": 0,
        "prompt_tokens": 0,
        "cached_tokens": 0,
        "preemptions": 0,
        "refused": 0,
        "kv_usage_mean": 0.0,
        "kv_usage_max": 0.0,
    }
    return ServerFigures(name=name, accelerator=accelerator, **defaults | fields)


def of(*records: Served, servers: tuple[ServerFigures, ...] = (server(),)) -> Figures:
    stage = StageRun(load=Load(rate=1.0), start_s=0.0, end_s=9.0, records=list(records), servers=servers)
    return figures(stage, lambda name: {"batch": Slo(ttft_s=60.0)}.get(name, SLO))


def test_each_request_is_judged_by_the_slo_of_its_class() -> None:
    slow = {"first_s": 5.0, "last_s": 7.0, "end_s": 7.0}
    found = of(
        served(slo_class="chat"),
        served(slo_class="chat", **slow),
        served(slo_class="batch", **slow),
        served(slo_class="batch", error="timeout"),
    )
    chat, batch = found.classes["chat"], found.classes["batch"]
    assert (chat.requests, chat.within_slo, batch.requests, batch.within_slo) == (2, 0.5, 2, 0.5)
    assert found.within_slo == 0.5
    assert found.goodput == pytest.approx(2 / 7.0)
    assert chat.goodput == batch.goodput == pytest.approx(1 / 7.0)
    assert chat.ttft is not None
    assert (chat.ttft.p50, chat.ttft.max) == (0.5, 5.0)


def test_prediction_error_is_of_answered_requests_and_has_no_sign() -> None:
    found = of(
        served(matched_tokens=70),
        served(matched_tokens=40),
        served(matched_tokens=999, error="timeout"),
        served(usage=Usage(100, 11, None)),
    )
    assert found.prediction_error_tokens == pytest.approx((10 + 20) / 2)
    assert found.predicted_cached_tokens == 70 + 40 + 64


def test_copies_are_the_endpoints_that_served_a_group() -> None:
    records = [served("a"), served("a"), served("b"), served("c", group=1), served("a", group=-1)]
    names = ("a", "b", "c")
    assert of(*records, servers=tuple(map(server, names))).copies_per_prefix == (2 + 1) / 2
    assert of(served(group=-1)).copies_per_prefix is None


def test_shares_and_use_by_endpoint_and_by_accelerator() -> None:
    servers = (
        server(
            "a", output_tokens=30, prompt_tokens=200, cached_tokens=50, kv_usage_mean=0.2, kv_usage_max=0.5
        ),
        server("b", output_tokens=10, preemptions=3, refused=2, kv_usage_mean=0.4, kv_usage_max=0.4),
        server("c", "gaudi3", output_tokens=60, prompt_tokens=100, cached_tokens=100),
    )
    found = of(served("a"), served("b"), served("c"), served("c"), servers=servers)
    h100, gaudi = found.accelerators["h100-nvl"], found.accelerators["gaudi3"]
    assert (h100.endpoints, h100.requests, h100.request_share, h100.output_share) == (2, 2, 0.5, 0.4)
    assert (h100.prefix_hit_rate, h100.preemptions, h100.refused) == (0.25, 3, 2)
    assert (h100.kv_usage_mean, h100.kv_usage_max) == pytest.approx((0.3, 0.5))
    assert (gaudi.request_share, gaudi.output_share, gaudi.prefix_hit_rate) == (0.5, 0.6, 1.0)
    assert list(found.parts) == ["a", "b", "c"]
    assert found.parts["b"].prefix_hit_rate is None
    assert found.prefix_hit_rate == 150 / 300
    assert (found.preemptions, found.kv_usage_max) == (3, 0.5)


PRICED = (
    server("a", price_per_hour=3.0, watts=1000.0),
    server("b", price_per_hour=1.0, watts=500.0),
)


def test_tokens_for_a_unit_and_a_kilowatt_hour_count_all_endpoints_or_those_at_work() -> None:
    later = {"due_s": 1.0, "sent_s": 1.0, "first_s": 1.5, "last_s": 2.0, "end_s": 2.0}
    much_later = {"due_s": 9.0, "sent_s": 9.0, "first_s": 9.5, "last_s": 10.0, "end_s": 10.0}
    found = of(served(), served(**later), served(**much_later), servers=PRICED)
    tokens = 33  # in ten seconds, in three of which a had requests and b never
    assert found.tokens_per_unit == pytest.approx(tokens / (4.0 * 10 / 3600))
    assert found.tokens_per_kwh == pytest.approx(tokens / (1.5 * 10 / 3600))
    assert found.working_tokens_per_unit == pytest.approx(tokens / (3.0 * 3 / 3600))
    assert found.working_tokens_per_kwh == pytest.approx(tokens / (1.0 * 3 / 3600))
    assert (found.parts["a"].working, found.parts["b"].working) == (pytest.approx(0.3), 0.0)
    assert found.accelerators["h100-nvl"].working == pytest.approx(0.15)


def test_where_one_endpoint_has_no_price_nobody_knows_what_a_token_costs() -> None:
    found = of(served(), servers=(server("a", price_per_hour=3.0, watts=1000.0), server("b", watts=500.0)))
    assert (found.tokens_per_unit, found.working_tokens_per_unit) == (None, None)
    assert found.tokens_per_kwh is not None
    assert found.working_tokens_per_kwh is not None


def test_where_a_class_went_and_what_it_got() -> None:
    servers = (server("a", "h100-nvl"), server("b", "gaudi3"))
    chat, batch = {"slo_class": "chat"}, {"slo_class": "batch"}
    found = of(served("a", **chat), served("a", **batch), served("b", **batch), servers=servers)
    assert found.classes["chat"].request_shares == {"h100-nvl": 1.0, "gaudi3": 0.0}
    assert found.classes["batch"].request_shares == {"h100-nvl": 0.5, "gaudi3": 0.5}
    assert found.classes["batch"].output_tok_s == pytest.approx(22 / 1.5)


def test_costs_have_a_table_where_the_scenario_has_prices_or_watts() -> None:
    def table(**costs: float) -> str:
        engines = (FleetItem(accelerator="gaudi3", count=2, **costs),)  # type: ignore[arg-type]
        scenario = Scenario(engines=engines, stages=(Load(rate=2, requests=6),), warm_up_stages=0)
        task = Task(scenario=scenario, policy=policy("random"), seed=0)
        return comparison(summarise_runs([simulate(task)]))

    assert "what it cost" not in table()
    assert re.search(
        r"what it cost +tok/kWh +at work +gaudi3 at work\nrandom +[\d,]+ +[\d,]+ +[\d.]+%", table(watts=900)
    )
    assert "tok/unit" in table(price_per_hour=1.5)


def test_failures_by_kind() -> None:
    found = of(
        served(),
        served(error="timeout", status=0),
        served(error="status 503", status=503, tries=3),
        served(error="status 429", status=429),
        served(error="status 502", status=502, tries=2),
    )
    assert (found.refused, found.timeouts, found.retried, found.ok) == (2, 1, 2, 1)
    assert found.errors == {"timeout": 1, "status 503": 1, "status 429": 1, "status 502": 1}


SMALL = Scenario(
    engines=(FleetItem(accelerator="h100-nvl", count=2), FleetItem(accelerator="gaudi3")),
    workload=SharedPrefix(
        groups=6, prompts_per_group=2, system_prompt_len=512, question_len=64, output_len=40
    ),
    stages=(Load(rate=5, duration_s=4), Load(rate=20, duration_s=5), Load(rate=40, duration_s=5)),
)


def run_of(policy_name: str, seed: int = 0, decisions: str = "") -> Run:
    return simulate(Task(scenario=SMALL, policy=policy(policy_name), seed=seed, decisions=decisions))


def test_the_figures_of_a_run_are_those_of_its_engines() -> None:
    simulation = Simulation(SMALL, policy("llm-d-blend"))
    stages = [figures(stage, SMALL.slo_of) for stage in simulation.run()]
    engines = [server.engine for server in simulation.servers.values()]
    assert sum(s.requests for s in stages) == 20 + 100 + 200
    assert sum(s.output_tokens for s in stages) == 320 * 40
    assert all(sum(p.output_share for p in s.parts.values()) == pytest.approx(1) for s in stages)
    cached = sum(engine.cache_hits_tokens for engine in engines)
    looked_up = sum(engine.cache_queries_tokens for engine in engines)
    told = sum(s.cached_tokens or 0 for s in stages)
    assert told == cached  # what usage tells is what the engines count
    hits = sum(
        s.prefix_hit_rate * sum(p.requests for p in s.parts.values()) for s in stages if s.prefix_hit_rate
    )
    assert hits / 320 == pytest.approx(cached / looked_up)


def test_warm_up_stages_are_not_reported() -> None:
    run = run_of("round-robin")
    assert [stage.load for stage in run.stages] == ["rate 20", "rate 40"]


def test_a_summary_has_the_mean_of_each_number() -> None:
    runs = [run_of(name, seed) for name in ("round-robin", "random") for seed in (1, 2)]
    summaries = summarise_runs(runs)
    assert [(s.policy, s.load) for s in summaries] == [
        ("round-robin", "rate 20"), ("random", "rate 20"), ("round-robin", "rate 40"), ("random", "rate 40"),
    ]  # fmt: skip
    last = summaries[-1]
    assert set(last.figures) == {name for name in METRICS if "tokens_per" not in name}, "SMALL has no prices"
    for name, found in last.figures.items():
        values = [metric(run.stages[1], name) for run in runs[2:]]
        assert found.mean == pytest.approx(sum(values) / 2), name
    assert sum(p.request_share.mean for p in last.accelerators.values()) == pytest.approx(1)


def test_decisions_of_equal_runs_are_equal_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        run_of("random", 3, str(tmp_path / name))
    run_of("random", 4, str(tmp_path / "c"))
    first, second, other = ((tmp_path / name).read_bytes() for name in "abc")
    assert first == second
    assert first != other
    assert first.count(b"\n") == 320


def test_classes_have_a_table_of_their_own_where_there_are_several() -> None:
    scene = msgspec.structs.replace(SMALL, workload=SloClasses(), stages=(Load(rate=5, duration_s=5),) * 2)
    runs = [simulate(Task(scenario=scene, policy=policy("random"), seed=seed)) for seed in (0, 1)]
    (summary,) = summarise_runs(runs)
    assert set(summary.classes) == {"interactive", "batch"}
    for name, found in summary.classes.items():
        assert found.within_slo.mean == fmean(run.stages[0].classes[name].within_slo for run in runs)
    table = comparison([summary])
    rows = re.findall(r"^random +(interactive|batch) +[\d,.]+ +([\d.]+)%", table, re.M)
    assert rows == [(name, f"{found.within_slo.mean * 100:.1f}") for name, found in summary.classes.items()]
    assert "by SLO class" not in comparison(summarise_runs([run_of("random")]))
