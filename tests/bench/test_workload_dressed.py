"""Adapters, tenants and SLO classes: calls of another workload, with something added to all that follow."""

from collections import Counter
from itertools import islice

import pytest

from pointsman.bench.workloads import (
    Adapters,
    Agents,
    Conversations,
    Part,
    SharedPrefix,
    SloClasses,
    Tenants,
    Unrelated,
)

PROMPTS = SharedPrefix(groups=4, prompts_per_group=2, system_prompt_len=20, question_len=5, output_len=3)
CHATS = Conversations(system_prompts=2, system_prompt_len=20, question_len=5, output_len=5, turns=5)


def chat(call):
    found = [call]
    while found[-1].then is not None:
        found += [following for _, following in found[-1].then()]
    return found


def test_adapters_are_asked_for_by_their_popularity():
    calls = list(islice(Adapters(adapters=10, zipf=1.0, of=PROMPTS).calls(0), 5000))
    counts = Counter(call.model for call in calls)
    assert sorted(counts) == sorted(f"lora-{i}" for i in range(10))
    assert counts["lora-0"] / 5000 == pytest.approx(0.341, abs=0.03)
    assert counts["lora-0"] / counts["lora-4"] == pytest.approx(5, rel=0.3)
    assert [call.prompt for call in calls[:20]] == [call.prompt for call in islice(PROMPTS.calls(0), 20)]


def test_some_calls_may_ask_for_the_base_model_and_adapters_may_have_names():
    calls = islice(Adapters(adapters=("sql", "law"), zipf=0.0, base_share=0.5, of=PROMPTS).calls(0), 2000)
    counts = Counter(call.model for call in calls)
    assert set(counts) == {"", "sql", "law"}
    assert counts[""] == pytest.approx(1000, rel=0.15)
    assert counts["sql"] == pytest.approx(500, rel=0.2)


def test_groups_are_of_one_adapter_or_tenant_only():
    for workload, said in (
        (Adapters(adapters=3, base_share=0.2, of=PROMPTS), lambda call: call.model),
        (Tenants(tenants=3, of=PROMPTS), lambda call: call.cache_salt),
    ):
        calls = list(islice(workload.calls(0), 400))
        kinds = {(call.group, said(call), call.prompt[:80]) for call in calls}
        assert len(kinds) == len({group for group, _, _ in kinds}) > 8


def test_tenants_start_their_prompts_alike_but_share_no_salt():
    calls = list(islice(Tenants(tenants=5, of=PROMPTS).calls(0), 500))
    salts = {call.cache_salt for call in calls}
    assert len(salts) == 5
    for salt in salts:
        starts = {call.prompt[:80] for call in calls if call.cache_salt == salt}
        assert len(starts) == 4
    assert len({call.prompt[:80] for call in calls}) == 4


@pytest.mark.parametrize("kind", [Adapters, Tenants])
def test_what_a_conversation_starts_with_it_keeps(kind):
    several = 0
    for first in islice(kind(of=CHATS).calls(4), 50):
        calls = chat(first)
        several += len(calls) > 1
        assert len({(call.model, call.cache_salt, call.group) for call in calls}) == 1
        assert calls[0].model or calls[0].cache_salt
    assert several > 20


CLASSES = SloClasses(
    parts=(
        Part(name="fast", weight=3, ttft_s=0.25, tpot_s=0.0405, of=CHATS),
        Part(name="slow", of=Unrelated(input_len=10)),
    )
)


def test_classes_have_their_share_their_limits_and_llm_ds_headers():
    calls = list(islice(CLASSES.calls(0), 2000))
    counts = Counter(call.slo_class for call in calls)
    assert counts["fast"] == pytest.approx(1500, rel=0.08)
    assert counts["fast"] + counts["slow"] == 2000
    assert {(call.slo_class, call.headers) for call in calls} == {
        (
            "fast",
            (
                ("x-llm-d-slo-ttft-ms", "250"),
                ("x-llm-d-slo-tpot-ms", "40.5"),
                ("x-llm-d-inference-objective", "fast"),
            ),
        ),
        ("slow", (("x-llm-d-inference-objective", "slow"),)),
    }


def test_all_turns_of_a_conversation_are_of_its_class():
    for first in islice(CLASSES.calls(0), 40):
        kinds = {(call.slo_class, call.headers, call.group) for call in chat(first)}
        assert len(kinds) == 1


def test_classes_of_the_same_kind_send_different_prompts():
    twice = SloClasses(parts=(Part(name="a", of=PROMPTS), Part(name="b", of=PROMPTS)))
    calls = list(islice(twice.calls(0), 200))
    starts = {(call.slo_class, call.group, call.prompt[:80]) for call in calls}
    assert len(starts) == len({group for _, group, _ in starts}) == len({text for _, _, text in starts}) == 8


@pytest.mark.parametrize(
    ("classes", "names"), [(2, ["interactive", "batch"]), (3, ["interactive", "standard", "batch"])]
)
def test_two_and_three_classes_are_ready_made(classes, names):
    workload = SloClasses(classes=classes)
    assert [part.name for part in workload.used] == names
    counts = Counter(call.slo_class for call in islice(workload.calls(0), 300))
    assert sorted(counts) == sorted(names)
    assert any(isinstance(part.of, Agents) for part in workload.used) == (classes == 3)


def test_a_class_that_ends_ends_the_calls(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"timestamp":0,"input_length":8,"output_length":2}\n')
    from pointsman.bench.workloads import Trace

    parts = (Part(name="once", of=Trace(str(tmp_path / "t.jsonl"))), Part(name="on", of=PROMPTS))
    calls = list(SloClasses(parts=parts).calls(0))
    assert Counter(call.slo_class for call in calls)["once"] == 1
    assert {call.at_s for call in calls} == {None}
