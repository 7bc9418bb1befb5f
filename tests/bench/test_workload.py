"""Laws that every family keeps, and the prompts of those whose calls stand alone."""

import random
from collections import Counter
from itertools import islice

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pointsman.bench.text import text
from pointsman.bench.workloads import (
    Adapters,
    Agents,
    Conversations,
    DecodeHeavy,
    MixedLengths,
    Part,
    SharedPrefix,
    SloClasses,
    Tenants,
    Unrelated,
)
from pointsman.bench.workloads.lengths import Exponential, LogNormal
from pointsman.errors import SettingsError

SMALL = SharedPrefix(groups=4, prompts_per_group=3, system_prompt_len=50, question_len=7, output_len=9)
CHATS = Conversations(system_prompts=3, system_prompt_len=20, question_len=5, output_len=8, turns=3)
TREES = Agents(system_prompts=2, system_prompt_len=20, task_len=5, step_len=4, output_len=6, branches=3)
FAMILIES = {
    "shared-prefix": SMALL,
    "shared-prefix, zipf": SharedPrefix(4, 3, 50, 7, 9, Exponential(), zipf=1.2, hot_for_calls=5),
    "shared-prefix, told": SharedPrefix(4, 3, 50, 7, 9, LogNormal(), tell_max_tokens=True),
    "random": Unrelated(input_len=30, output_len=5, spread=0.5),
    "conversations": CHATS,
    "agents": TREES,
    "decode-heavy": DecodeHeavy(input_len=20),
    "mixed-lengths": MixedLengths(short_len=10, long_len=2000, long_share=0.3),
    "mixed-lengths, documents": MixedLengths(10, 2000, 0.3, documents=2, question_len=20),
    "lora": Adapters(adapters=3, of=CHATS),
    "tenants": Tenants(tenants=3, of=TREES),
    "slo-classes": SloClasses(
        parts=(Part(name="a", of=TREES), Part(name="b", weight=2, of=Adapters(of=CHATS)))
    ),
}


def everything(workload, seed, first, order=0):
    """The first calls and all that follow from them, which end in an order of their own."""
    shuffle, calls = random.Random(order), []
    waiting = list(islice(workload.calls(seed), first))
    while waiting:
        call = waiting.pop(shuffle.randrange(len(waiting)))
        calls.append(call)
        if call.then is not None:
            waiting += [following for _, following in call.then()]
    return calls


def as_bytes(calls):
    """What is sent, call by call, in an order that does not depend on when each ended."""
    return sorted(msgspec.msgpack.encode(msgspec.structs.replace(call, then=None)) for call in calls)


@pytest.mark.parametrize("family", FAMILIES)
@given(seed=st.integers(0, 2**31), order=st.integers(0, 2**31))
@settings(max_examples=8, deadline=None)
def test_the_seed_decides_every_byte_whatever_ends_first(family, seed, order):
    workload = FAMILIES[family]
    first = as_bytes(everything(workload, seed, 12))
    assert first == as_bytes(everything(workload, seed, 12, order))
    assert first != as_bytes(everything(workload, seed + 1, 12))


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_are_as_long_as_they_say(family):
    calls = everything(FAMILIES[family], 3, 40)
    assert len(calls) >= 40
    for call in calls:
        assert len(call.prompt) == 4 * call.prompt_tokens
        assert call.prompt.isascii()
        assert call.output_tokens >= 1
        assert len(call.answer) in (0, 4 * call.output_tokens)
        assert call.at_s is None


@pytest.mark.parametrize("family", FAMILIES)
def test_a_router_is_told_the_length_of_an_output_only_where_the_workload_says_so(family):
    calls = everything(FAMILIES[family], 3, 20)
    if family.endswith("told"):
        assert [call.max_tokens for call in calls] == [call.output_tokens for call in calls]
    else:
        assert {call.max_tokens for call in calls} == {None}


def test_a_token_is_four_bytes():
    assert [len(text(random.Random(1), n)) for n in (0, 1, 1000)] == [0, 4, 4000]
    assert text(random.Random(1), 1000).isascii()
    assert {len(word) for word in text(random.Random(1), 5000).split()} == {3}


def test_shared_prefix_prompts_share_exactly_their_system_prompt():
    calls = list(islice(SMALL.calls(0), 12))
    assert len({call.prompt for call in calls}) == 12
    assert Counter(call.group for call in calls) == {0: 3, 1: 3, 2: 3, 3: 3}
    assert {(len(c.prompt), c.prompt_tokens, c.output_tokens) for c in calls} == {(57 * 4, 57, 9)}
    starts = {(call.group, call.prompt[: 50 * 4]) for call in calls}
    assert len(starts) == 4
    assert len({start for _, start in starts}) == 4
    assert len({call.prompt[50 * 4 :] for call in calls}) == 12


def test_shared_prefix_prompts_are_shuffled_once_and_then_cycled():
    calls = list(islice(SMALL.calls(0), 36))
    assert calls[:12] == calls[12:24] == calls[24:]
    assert [call.group for call in calls[:12]] != sorted(call.group for call in calls[:12])


def test_a_prompt_that_comes_again_has_an_output_of_the_same_length():
    for workload in (SharedPrefix(3, 2, 8, 8, 100, Exponential()), SharedPrefix(3, 2, 8, 8, 100, zipf=1.0)):
        calls = list(islice(workload.calls(1), 200))
        assert len({(c.prompt, c.output_tokens) for c in calls}) == len({c.prompt for c in calls}) == 6


def test_popular_groups_come_often():
    calls = list(islice(SharedPrefix(20, 5, 16, 8, 8, zipf=1.0).calls(2), 8000))
    counts = sorted(Counter(call.group for call in calls).values(), reverse=True)
    assert len(counts) == 20
    expected = [8000 / rank / sum(1 / r for r in range(1, 21)) for rank in range(1, 21)]
    assert counts[0] == pytest.approx(expected[0], rel=0.1)
    assert sum(counts[:5]) == pytest.approx(sum(expected[:5]), rel=0.1)
    prompts = Counter(call.prompt for call in calls if call.group == calls[0].group)
    assert len(prompts) == 5


def test_other_groups_become_popular_after_so_many_calls():
    calls = list(islice(SharedPrefix(50, 5, 16, 8, 8, zipf=1.5, hot_for_calls=500).calls(0), 3000))
    hottest = [
        Counter(call.group for call in calls[start : start + 500]).most_common(1)[0][0]
        for start in range(0, 3000, 500)
    ]
    assert len(set(hottest)) >= 4
    assert (
        hottest
        == [  # and within a while, it stays
            Counter(call.group for call in calls[start : start + 250]).most_common(1)[0][0]
            for start in range(0, 3000, 500)
        ]
    )


def test_unrelated_prompts_share_nothing_and_keep_to_their_spread():
    calls = list(islice(Unrelated(input_len=100, output_len=50, spread=0.2).calls(0), 300))
    assert len({call.prompt[:80] for call in calls}) == 300
    lengths = [call.prompt_tokens for call in calls]
    assert min(lengths) >= 80
    assert max(lengths) <= 120
    assert len(set(lengths)) > 20
    assert sum(call.output_tokens for call in calls) / 300 == pytest.approx(50, rel=0.05)


def test_reasoning_outputs_are_long_or_short_and_nothing_between():
    calls = list(islice(DecodeHeavy(input_len=20).calls(0), 1000))
    long = [call.output_tokens for call in calls if call.output_tokens >= 4000]
    short = [call.output_tokens for call in calls if call.output_tokens < 4000]
    assert len(short) == pytest.approx(300, abs=60)
    assert sum(short) / len(short) == pytest.approx(300, rel=0.25)
    assert max(long) <= 8000
    assert sum(long) / len(long) == pytest.approx(6000, rel=0.05)
    assert len({call.prompt for call in calls}) == 1000


def test_long_prompts_are_as_rare_as_they_should_be_and_share_nothing():
    calls = list(islice(MixedLengths(short_len=10, long_len=1000, long_share=0.1).calls(0), 1000))
    assert Counter(call.prompt_tokens for call in calls)[1000] == pytest.approx(100, abs=35)
    assert {call.prompt_tokens for call in calls} == {10, 1000}
    assert len({call.prompt[:36] for call in calls}) == 1000


def test_long_prompts_can_be_questions_about_few_documents():
    workload = MixedLengths(short_len=10, long_len=1000, long_share=0.5, documents=3, question_len=50)
    long = [call for call in islice(workload.calls(0), 200) if call.prompt_tokens == 1000]
    assert len({(call.group, call.prompt[: 950 * 4]) for call in long}) == 3
    assert len({call.prompt[950 * 4 :] for call in long}) == len(long) > 50


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: SharedPrefix(groups=0), "^groups: must be at least 1"),
        (lambda: SharedPrefix(question_len=-1), "^question_len"),
        (lambda: SharedPrefix(question_len=0, system_prompt_len=0), "^system_prompt_len"),
        (lambda: SharedPrefix(hot_for_calls=10), "^hot_for_calls: .*zipf"),
        (lambda: SharedPrefix(zipf=-1.0), "^zipf: must be at least 0"),
        (lambda: Unrelated(input_len=0), "^input_len"),
        (lambda: Unrelated(spread=1.0), "^spread: must be below 1"),
        (lambda: LogNormal(cv=0), "^cv: must be above 0"),
        (lambda: Conversations(think_s=-1), "^think_s"),
        (lambda: Agents(branches=0), "^branches"),
        (lambda: DecodeHeavy(long_most=100), "^long_most: .*long_least"),
        (lambda: DecodeHeavy(short_share=2), "^short_share: must be at most 1"),
        (lambda: MixedLengths(long_len=100, documents=1), "^question_len: .*long_len"),
        (lambda: Adapters(adapters=0), "^adapters"),
        (lambda: Adapters(adapters=()), "^adapters"),
        (lambda: Tenants(tenants=0), "^tenants"),
        (lambda: Part(name="a", weight=0), "^weight"),
        (lambda: Part(name="two words"), "^name"),
        (lambda: SloClasses(parts=(Part(name="a"), Part(name="a"))), "^parts"),
    ],
)
def test_a_workload_that_cannot_be_names_its_parameter(make, names):
    with pytest.raises(SettingsError, match=names):
        make()
