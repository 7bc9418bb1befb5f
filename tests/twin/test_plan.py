"""A trace of a simulated run, planned: what is replayed is what happened, and changes change what they
should.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import product
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from pointsman.bench.report import Slo
from pointsman.bench.run import Load
from pointsman.bench.workloads import SharedPrefix, Trace
from pointsman.bench.workloads.recorded import Recording, read_recording
from pointsman.errors import SettingsError
from pointsman.observability.trace import Fleet as FleetLine
from pointsman.observability.trace import Header, Known, Ruled, Traced
from pointsman.sim.spec import FleetItem
from pointsman.twin.compare import Task as Simulated
from pointsman.twin.compare import simulate
from pointsman.twin.plan import Result, Source, Task, keeps, merged, policy_of, recorded, replay
from pointsman.twin.plan_cheapest import Search, cheapest
from pointsman.twin.plan_fleet import Fleet, Kinds, add, of_counts, prices_of, recorded_fleet, remove
from pointsman.twin.plan_fleet import replace as replaced
from pointsman.twin.plan_tables import Alternative, compared, error_text, extrapolated
from pointsman.twin.policies import policy
from pointsman.twin.scenario import Scenario

SLO = Slo(ttft_s=0.5, tpot_s=0.03)
ENGINES = (
    FleetItem(accelerator="h100-nvl", count=2, price_per_hour=3.0),
    FleetItem(accelerator="mi325x", count=2, price_per_hour=2.5),
)
WORKLOAD = SharedPrefix(
    groups=20, prompts_per_group=10, system_prompt_len=2000, question_len=300, output_len=120
)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> str:
    """40 s of 30 requests/s under the default policy."""
    path = tmp_path_factory.mktemp("plan") / "trace.jsonl"
    scenario = Scenario(
        engines=ENGINES, workload=WORKLOAD, stages=(Load(rate=30, duration_s=40),), warm_up_stages=0
    )
    simulate(Simulated(scenario=scenario, policy=policy("default"), seed=0, trace=str(path)))
    return str(path)


def source(path: str, **changes: object) -> Source:
    fields: dict[str, object] = {"path": path, "last": 20_000, "slo": SLO}
    return Source(**fields | changes)


def fleet_of(path: str) -> tuple[Recording, Fleet, Kinds]:
    recording = read_recording(path)
    fleet, _ = recorded_fleet(recording)
    return recording, fleet, Kinds(fleet, ["granite-4.1-8b"])


def planned(
    path: str, change: Callable[[Fleet, Kinds], Fleet] = lambda fleet, _: fleet, **how: float
) -> Result:
    recording, fleet, kinds = fleet_of(path)
    under = policy_of(recording.header.policy)
    return replay(Task(source=source(path, **how), fleet=change(fleet, kinds), policy=under))


def test_what_is_planned_unchanged_is_what_happened(trace: str) -> None:
    was, replayed = recorded(read_recording(trace), SLO), planned(trace)
    assert was.requests == replayed.requests == pytest.approx(1080, abs=60), "all but the warm-up"
    assert was.ok == replayed.ok == was.requests
    assert replayed.output_tok_s == pytest.approx(was.output_tok_s, rel=0.03)
    assert was.tpot
    assert replayed.tpot
    assert replayed.tpot.p50 == pytest.approx(was.tpot.p50, rel=0.1)
    errors = compared(was, [replayed])
    assert all(each.believable for each in errors), error_text(errors)
    assert "near enough" in error_text(errors)


def test_the_replay_sends_the_recorded_requests(trace: str) -> None:
    recording = read_recording(trace)
    calls = list(Trace(trace).calls(0))
    assert [call.output_tokens for call in calls] == [120] * len(recording.requests)
    assert {len(call.prompt) for call in calls} == {2300 * 4}
    gaps = [one.at_s - recording.requests[0].at_s for one in recording.requests]
    assert [call.at_s for call in calls] == pytest.approx(gaps)
    starts = {call.prompt[: 31 * 256] for call in calls}  # the last whole block of 2,000 tokens
    assert len(starts) == 20, "as many prefixes as there were groups"
    assert len({call.prompt[: 35 * 256] for call in calls}) == 200, "as many prompts"


def test_it_can_be_sent_faster_or_in_part(trace: str) -> None:
    calls = list(Trace(trace).calls(0))
    assert [c.at_s for c in Trace(trace, faster=2.0).calls(0)] == [(c.at_s or 0) / 2 for c in calls]
    assert [c.prompt for c in Trace(trace, last=7).calls(0)] == [c.prompt for c in calls[-7:]]


def test_more_endpoints_carry_more(trace: str) -> None:
    as_it_is = planned(trace, scale=6.0)
    more = planned(trace, lambda fleet, kinds: add(fleet, "4xmi325x", kinds), scale=6.0)
    fewer = planned(trace, lambda fleet, _: remove(fleet, "mi325x"), scale=6.0)
    assert fewer.output_tok_s * 1.2 < as_it_is.output_tok_s < more.output_tok_s / 1.2
    assert fewer.tpot
    assert as_it_is.tpot
    assert more.tpot
    assert fewer.tpot.p50 > as_it_is.tpot.p50 > more.tpot.p50
    assert sum(n for name, n in more.requests_by_endpoint.items() if name.startswith("mi325x+")) > 100


def tampered(path: str, to: Path, **factors: float) -> str:
    """The trace with what was learned multiplied."""
    lines = []
    for line in Path(path).read_bytes().splitlines():
        if line.startswith(b'["fleet"'):
            told = msgspec.json.decode(line, type=FleetLine)
            known = [
                replace(
                    e, learned=e.learned and {k: v and v * factors.get(k, 1) for k, v in e.learned.items()}
                )
                for e in told.endpoints
            ]
            line = msgspec.json.encode(replace(told, endpoints=tuple(known)))
        lines.append(line)
    found = to / "tampered.jsonl"
    found.write_bytes(b"\n".join(lines) + b"\n")
    return str(found)


def test_an_error_that_is_too_large_is_named(trace: str, tmp_path: Path) -> None:
    wrong = tampered(trace, tmp_path, step_rest_s=2.0, step_sequence_s=2.0, step_context_token_s=2.0)
    errors = compared(recorded(read_recording(wrong), SLO), [planned(wrong)])
    assert {each.figure for each in errors if not each.believable} >= {"TPOT p50", "TPOT p99"}
    assert "DO NOT BELIEVE what follows of TTFT" in error_text(errors) or "of TPOT" in error_text(errors)


def test_the_cost_of_prefill_is_read_off_the_requests(trace: str, tmp_path: Path) -> None:
    for path in (trace, tampered(trace, tmp_path, prefill_tok_s=2.0)):
        _, fleet, _ = fleet_of(path)
        for item in fleet.items:
            found, true = item.parameters(), FleetItem(accelerator=item.accelerator).parameters()
            assert found.prefill_tokens_per_s == pytest.approx(true.prefill_tokens_per_s, rel=0.25)
            assert found.prefill_step_s == pytest.approx(true.prefill_step_s, rel=0.4)


def test_what_is_planned_is_what_the_true_engines_do(trace: str) -> None:
    recording, fleet, kinds = fleet_of(trace)
    under = policy_of(recording.header.policy)

    def seeds(engines: Fleet) -> Result:
        tasks = [Task(source=source(trace), fleet=engines, policy=under, seed=i) for i in range(3)]
        return merged([replay(task) for task in tasks])

    for changed in (add(fleet, "2xmi325x", kinds), remove(fleet, "1xh100-nvl")):
        plain = [FleetItem(accelerator=i.accelerator, name=i.name, model=i.model) for i in changed.items]
        learned, true = seeds(changed), seeds(Fleet(tuple(plain)))
        assert learned.output_tok_s == pytest.approx(true.output_tok_s, rel=0.03)
        assert learned.ttft
        assert true.ttft
        assert learned.ttft.p50 == pytest.approx(true.ttft.p50, rel=0.25)
        assert learned.tpot
        assert true.tpot
        assert learned.tpot.p50 == pytest.approx(true.tpot.p50, rel=0.15)


def test_what_happened_among_the_replays_is_believed(trace: str) -> None:
    was = planned(trace)
    assert was.ttft
    far = [replace(was, ttft=replace(was.ttft, p99=was.ttft.p99 * factor)) for factor in (0.5, 2.9)]
    (p99,) = [each for each in compared(was, far) if each.figure == "TTFT p99"]
    assert p99.error == pytest.approx(0.7)
    assert p99.between_seeds == pytest.approx(1.2)
    assert p99.believable
    assert not next(each for each in compared(was, far[1:]) if each.figure == "TTFT p99").believable


def test_batches_are_as_large_as_is_said(trace: str) -> None:
    _, fleet, _ = fleet_of(trace)
    kinds = Kinds(fleet, (), {"mi325x": 7, "gaudi3": 9})
    changed = add(add(fleet, "mi325x", kinds), "gaudi3", kinds)
    assert [i.parameters().max_sequences for i in changed.items] == [1024] * 4 + [7, 9]
    assert [i.parameters().max_sequences for i in kinds.limited(fleet).items] == [1024] * 2 + [7] * 2


def test_equal_seeds_give_equal_plans(trace: str) -> None:
    assert planned(trace) == planned(trace)


def test_the_mean_over_seeds_is_of_each_figure(trace: str) -> None:
    one = planned(trace)
    other = replace(one, output_tok_s=one.output_tok_s + 100, within_slo=0.5)
    both = merged([one, other])
    assert both.output_tok_s == pytest.approx(one.output_tok_s + 50)
    assert both.within_slo == pytest.approx(((one.within_slo or 0) + 0.5) / 2)
    assert both.requests_by_endpoint == one.requests_by_endpoint
    assert merged([one]) is one


def test_a_replay_that_has_lost_ends_early_and_one_that_has_not_does_not(trace: str) -> None:
    recording, fleet, _ = fleet_of(trace)
    under = policy_of(recording.header.policy)
    good = Task(source=source(trace), fleet=fleet, policy=under, hopeless=True)
    assert replay(good) == replay(replace(good, hopeless=False))
    assert keeps(replay(good), 0.99)
    lost = replay(replace(good, fleet=remove(fleet, "h100-nvl"), source=source(trace, scale=3.0)))
    assert lost.broken_off
    assert not keeps(lost, 0.5)
    assert lost.requests < 1000


def test_the_cheapest_mix_is_the_one_that_trying_all_finds(trace: str) -> None:
    recording, fleet, kinds = fleet_of(trace)
    prices = prices_of(recording, fleet)
    assert prices == {"h100-nvl": 3.0, "mi325x": 2.5}
    judged = source(trace, scale=2.0)
    under = policy("llm-d-blend")
    search = Search(
        source=judged,
        policy=under,
        recorded=fleet,
        kinds=kinds,
        prices=prices,
        most={"h100-nvl": 2, "mi325x": 3},
    )

    @cache
    def once(counts: tuple[int, int]) -> Result:
        mix = of_counts(fleet, dict(zip(prices, counts, strict=True)), kinds)
        return replay(Task(source=judged, fleet=mix, policy=under, hopeless=True))

    def each(tasks: Sequence[Task]) -> list[Result]:
        return [once((t.fleet.counts.get("h100-nvl", 0), t.fleet.counts.get("mi325x", 0))) for t in tasks]

    found = cheapest(search, recording, each)
    holding = [
        (3.0 * h + 2.5 * m, h, m)
        for h, m in product(range(3), range(4))
        if h + m and keeps(once((h, m)), 0.99)
    ]
    assert 0 < len(holding) < 11, "neither all nor none"
    assert found.price == min(holding)[0]
    assert found.fleet
    assert found.fleet.price(prices) == found.price
    assert found.replays < found.mixes == 12


def test_where_nothing_keeps_the_slo_there_is_no_cheapest(trace: str) -> None:
    recording, fleet, kinds = fleet_of(trace)
    search = Search(
        source=source(trace, slo=Slo(ttft_s=0.001)),
        policy=policy("random"),
        recorded=fleet,
        kinds=kinds,
        prices={"mi325x": 1.0},
        most={"mi325x": 2},
    )
    found = cheapest(search, recording, lambda tasks: [replay(task) for task in tasks])
    assert (found.fleet, found.replays) == (None, 1)


class TestChanges:
    def test_endpoints_come_go_and_are_replaced(self, trace: str) -> None:
        _, fleet, kinds = fleet_of(trace)
        assert fleet.told == "2 h100-nvl, 2 mi325x"
        assert add(fleet, "3xmi325x", kinds).counts == {"h100-nvl": 2, "mi325x": 5}
        assert add(fleet, "gaudi3", kinds).counts == {"h100-nvl": 2, "mi325x": 2, "gaudi3": 1}
        assert add(add(fleet, "mi325x", kinds), "mi325x", kinds).counts["mi325x"] == 4
        assert [i.name for i in remove(fleet, "h100-nvl-0").items] == ["h100-nvl-1", "mi325x-0", "mi325x-1"]
        assert remove(fleet, "1xmi325x").counts == {"h100-nvl": 2, "mi325x": 1}
        assert remove(fleet, "mi325x").counts == {"h100-nvl": 2}
        assert replaced(fleet, "h100-nvl=mi325x", kinds).counts == {"mi325x": 4}
        assert replaced(fleet, "2xmi325x=1xgaudi3", kinds).counts == {"h100-nvl": 2, "gaudi3": 1}
        assert replaced(fleet, "h100-nvl-1=mi325x", kinds).counts == {"h100-nvl": 1, "mi325x": 3}

    def test_what_is_added_is_like_the_recorded_ones_and_else_as_the_simulator_knows_it(
        self, trace: str
    ) -> None:
        _, fleet, kinds = fleet_of(trace)
        own = fleet.items[-1].parameters()
        (more,) = [i for i in add(fleet, "mi325x", kinds).items if i.name.endswith("+1")]
        assert more.parameters().base_s == pytest.approx(own.base_s, rel=0.3)
        assert more.parameters().kv_tokens == own.kv_tokens == 1_000_000
        assert not kinds.guessed("mi325x")
        (new,) = [i for i in add(fleet, "gaudi3", kinds).items if i.accelerator == "gaudi3"]
        assert new.parameters().base_s == pytest.approx(9.8e-3)
        assert kinds.guessed("gaudi3")

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda fleet, kinds: add(fleet, "4xmi325", kinds), r"--add: 'mi325' is no kind.*did you mean"),
            (lambda fleet, kinds: add(fleet, "0xmi325x", kinds), "--add: '0xmi325x': write a kind"),
            (
                lambda fleet, kinds: remove(fleet, "gaudi3"),
                "--remove: there is no 'gaudi3'.*h100-nvl, mi325x",
            ),
            (lambda fleet, kinds: remove(fleet, "3xmi325x"), "--remove: 3xmi325x: there are only 2"),
            (lambda fleet, kinds: replaced(fleet, "mi325x", kinds), "--replace: 'mi325x': write OLD=NEW"),
            (lambda fleet, kinds: replaced(fleet, "mi325x=x", kinds), "--replace: 'x' is no kind"),
        ],
    )
    def test_one_that_cannot_be_made_is_named(
        self, trace: str, change: Callable[[Fleet, Kinds], Fleet], says: str
    ) -> None:
        _, fleet, kinds = fleet_of(trace)
        with pytest.raises(SettingsError, match=says):
            change(fleet, kinds)


LEARNED = {
    "prefill_tok_s": 10_000.0,
    "step_rest_s": 0.01,
    "step_s": 0.02,
    "step_sequence_s": 1e-4,
    "step_context_token_s": 5e-8,
    "siblings": 0,
    "factor": 1.0,
    "evidence_s": 300.0,
}


def line(number: int, **changes: object) -> Traced:
    fields: dict[str, object] = {
        "number": number, "at_s": float(number), "model": "m", "endpoint": "a", "stream": True,
        "ending": "ok", "prompt_tokens": 100, "like": -1, "shared": 0, "new": 1, "max_tokens": None,
        "told_prompt_tokens": None, "output_tokens": 11, "cached_tokens": None, "response_bytes": 2200,
        "ttft_s": 0.5, "duration_s": 1.5, "tries": 1, "priority": 0, "slo_ttft_ms": None, "slo_tpot_ms": None,
        "matched_tokens": 0, "predicted_ttft_s": None, "predicted_step_s": None,
    }  # fmt: skip
    return Traced(**fields | changes)


def written(folder: Path, *requests: Traced, endpoints: Sequence[Known] = ()) -> str:
    known = tuple(endpoints) or (Known(name="a", block_tokens=16, kv_blocks=1000, learned=LEARNED),)
    records = [Header(unix_s=0.0, policy=Ruled(preset="least-cost")), FleetLine(0.0, known), *requests]
    path = folder / "made.jsonl"
    path.write_bytes(b"".join(msgspec.json.encode(record) + b"\n" for record in records))
    return str(path)


def test_what_happened_is_read_as_clients_saw_it(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        line(0),
        line(1, stream=False, ttft_s=9.0, duration_s=9.0),
        line(2, ending="cancelled", output_tokens=None),
        line(3, ending="refused", endpoint=""),
        line(4, slo_ttft_ms=400.0),
    )
    recording = read_recording(path)
    assert (len(recording.requests), recording.refused) == (4, 1)
    was = recorded(recording, Slo(ttft_s=1.0))
    assert was.requests == 3, "the first tenth is warm-up"
    assert was.ok == 2
    assert was.ttft
    assert was.tpot
    assert (was.ttft.count, was.ttft.p50) == (1, 0.5), "who does not stream has no first token to see"
    assert was.tpot.p50 == pytest.approx(0.1)
    assert was.within_slo == pytest.approx(1 / 3), "one was cancelled, one had a tighter limit of its own"


def test_what_the_engine_did_not_count_is_told_by_bytes(tmp_path: Path) -> None:
    lines = [line(i, told_prompt_tokens=150, response_bytes=1100) for i in range(30)]
    recording = read_recording(written(tmp_path, *lines, line(30, output_tokens=None, response_bytes=3000)))
    assert recording.tokens_told == pytest.approx(1.5), "the engine counts 150 where 100 are estimated"
    assert recording.block_tokens == 96
    assert recording.prompt_tokens(recording.requests[-1]) == 150
    assert recording.output_tokens(recording.requests[-1]) == 30, "at 100 bytes a token"
    fleet, _ = recorded_fleet(recording)
    assert fleet.items[0].parameters().prefill_tokens_per_s == pytest.approx(15_000)


def test_endpoints_that_are_not_labelled_are_of_a_kind_when_they_are_alike(tmp_path: Path) -> None:
    def known(name: str, kv_blocks: int, labels: dict[str, str] | None = None) -> Known:
        return Known(
            name=name,
            engine="vllm",
            block_tokens=16,
            kv_blocks=kv_blocks,
            labels=labels or {},
            learned=LEARNED,
            price_per_hour=2.0 if name == "a" else 0.0,
        )

    told = [
        known("a", 1000),
        known("b", 1020),
        known("c", 2000),
        known("d", 0),
        known("e", 0),
        known("f", 1000, {"accelerator": "h100", "price": "4.5"}),
    ]
    recording = read_recording(written(tmp_path, line(0), line(1), endpoints=told))
    fleet, remarks = recorded_fleet(recording)
    assert [i.accelerator for i in fleet.items] == ["a", "a", "c", "d", "e", "h100"]
    assert remarks == ["KV size not published, so never full here: d, e"]
    assert prices_of(recording, fleet) == {"a": 2.0, "h100": 4.5}
    assert fleet.price({"a": 2.0}) is None
    assert fleet.price({"a": 2.0, "c": 1.0, "d": 1.0, "e": 1.0, "h100": 4.5}) == 11.5


def test_what_was_recorded_without_learning_cannot_be_planned(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="nothing was learned of a: record it under a policy that learns"):
        recorded_fleet(read_recording(written(tmp_path, line(0), endpoints=[Known(name="a")])))
    with pytest.raises(SettingsError, match="nothing else of b"):
        recorded_fleet(read_recording(written(tmp_path, line(0, endpoint="b"))))


def test_limits_that_requests_brought_are_sent_again(tmp_path: Path) -> None:
    path = written(tmp_path, line(0, slo_ttft_ms=400.0, slo_tpot_ms=30.5, max_tokens=64))
    (call,) = Trace(path).calls(0)
    assert dict(call.headers) == {"x-llm-d-slo-ttft-ms": "400", "x-llm-d-slo-tpot-ms": "30.5"}
    assert (call.model, call.max_tokens, call.output_tokens) == ("m", 64, 11)


def test_the_recorded_policy_is_the_one_that_is_replayed() -> None:
    ruled = Ruled(preset="llm-d-blend", parameters={"queue-scorer": {"weight": 3}})
    assert policy_of(ruled).name == "llm-d-blend:queue-scorer.weight=3"
    policy_of(ruled).load()
    document = "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\nplugins: [{type: random-picker}]\n"
    assert policy_of(Ruled(preset="least-cost", picker_config=document)).picker_config == document


def test_loads_that_were_never_seen_are_said(trace: str) -> None:
    recording, fleet, _ = fleet_of(trace)
    happened = recorded(recording, SLO)

    def line_of(name: str, engines: Fleet, result: Result) -> Alternative:
        return Alternative(name=name, policy="p", fleet=engines, result=result)

    same = line_of("as recorded", fleet, planned(trace))
    fewer = remove(fleet, "mi325x")
    much = line_of("fewer", fewer, planned(trace, lambda _, __: fewer, scale=3.0))
    assert extrapolated(happened, [same, same]) == []
    (said,) = extrapolated(happened, [same, much])
    at_once = sum(much.result.in_flight_by_endpoint.values()) / 2
    assert said.startswith(f"EXTRAPOLATED: fewer: {at_once:.0f} requests at once on each h100-nvl, where ")


def test_the_cheapest_mix_keeps_the_slo_with_every_seed(trace: str) -> None:
    recording, fleet, kinds = fleet_of(trace)
    search = Search(
        source=source(trace),
        policy=policy("default"),
        recorded=fleet,
        kinds=kinds,
        prices={"mi325x": 2.0},
        most={"mi325x": 3},
        seeds=3,
    )
    good, bad = planned(trace), replace(planned(trace), within_slo=0.98)
    assert keeps(good, 0.99)

    def seeds(tasks: Sequence[Task]) -> list[Result]:
        """Two endpoints do with one seed of the three only."""
        return [bad if task.fleet.counts["mi325x"] < 3 and task.seed == 2 else good for task in tasks]

    found = cheapest(search, recording, seeds)
    assert found.fleet
    assert found.fleet.told == "3 mi325x"
