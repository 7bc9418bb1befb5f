"""Conversations and agent trees: what the calls share that follow from one another."""

import random
from collections import Counter
from itertools import islice, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pointsman.bench.workloads import Agents, Conversations
from pointsman.bench.workloads.lengths import Exponential, Fixed, Uniform

SHAPES = st.sampled_from([Fixed(), Uniform(0.5), Exponential()])


def turns(call):
    """All turns of the conversation that starts with this call, with the think time before each."""
    found = [(None, call)]
    while found[-1][1].then is not None:
        (following,) = found[-1][1].then()
        found.append(following)
    return found


@given(
    seed=st.integers(0, 2**31),
    system=st.integers(0, 40),
    question=st.integers(1, 30),
    output=st.integers(1, 40),
    shape=SHAPES,
)
@settings(max_examples=30, deadline=None)
def test_a_turn_goes_on_from_all_that_was_said(seed, system, question, output, shape):
    workload = Conversations(
        system_prompts=2,
        system_prompt_len=system,
        question_len=question,
        question_shape=shape,
        output_len=output,
        output_shape=shape,
        turns=4,
    )
    for first in islice(workload.calls(seed), 5):
        calls = [call for _, call in turns(first)]
        for before, after in pairwise(calls):
            assert after.prompt.startswith(before.prompt + before.answer)
            assert len(before.answer) == 4 * before.output_tokens
            assert after.prompt_tokens > before.prompt_tokens + before.output_tokens
        assert calls[-1].answer == ""


def test_conversations_share_their_system_prompt_and_nothing_else():
    workload = Conversations(system_prompts=3, system_prompt_len=50, question_len=30)
    calls = list(islice(workload.calls(0), 60))
    starts = {(call.group, call.prompt[:200]) for call in calls}
    assert len(starts) == len({start for _, start in starts}) == 3
    assert len({call.prompt[200:] for call in calls}) == 60


def test_conversations_have_as_many_turns_and_pauses_as_asked_for():
    workload = Conversations(system_prompt_len=10, question_len=5, output_len=5, turns=4, think_s=8.0)
    chats = [turns(first) for first in islice(workload.calls(1), 600)]
    lengths = Counter(len(chat) for chat in chats)
    assert sum(n * times for n, times in lengths.items()) / 600 == pytest.approx(4, rel=0.15)
    assert len(lengths) > 8
    pauses = [think_s for chat in chats for think_s, _ in chat if think_s is not None]
    assert sum(pauses) / len(pauses) == pytest.approx(8.0, rel=0.1)
    assert min(pauses) < 1.0
    assert max(pauses) > 20.0


def test_a_conversation_ends_before_it_does_not_fit():
    workload = Conversations(
        system_prompt_len=50, question_len=50, output_len=100, turns=50, max_prompt_len=1000
    )
    longest = [turns(first)[-1][1].prompt_tokens for first in islice(workload.calls(2), 50)]
    assert max(longest) <= 1000
    assert sum(length > 600 for length in longest) > 20


def test_one_turn_may_be_all():
    workload = Conversations(turns=1, turns_shape=Fixed(), max_prompt_len=1)
    assert [call.then for call in islice(workload.calls(0), 5)] == [None] * 5


TREE = Agents(
    system_prompts=2, system_prompt_len=30, task_len=10, branches=4, levels=3, step_len=8, output_len=12
)


def grown(root, order=0):
    """Branches as lists of calls, the last call, and the waits before calls of branches."""
    shuffle = random.Random(order)
    waiting = [([], following) for following in root.then()]
    branches, last, waits = [branch for branch, _ in waiting], [], []
    while waiting:
        branch, (wait_s, call) = waiting.pop(shuffle.randrange(len(waiting)))
        branch.append(call)
        waits.append(wait_s)
        following = call.then()
        if call.answer:
            waiting += [(branch, each) for each in following]
        else:
            last += [each for _, each in following]
    (join,) = last
    return branches, join, waits


@pytest.mark.parametrize("order", range(5))
def test_branches_go_on_from_the_root_and_the_last_call_from_all_branches(order):
    for root in islice(TREE.calls(3), 20):
        said = root.prompt + root.answer
        branches, join, _ = grown(root, order)
        assert len(branches) == 4
        for branch in branches:
            assert 1 <= len(branch) <= 3
            assert branch[0].prompt.startswith(said)
            for before, after in pairwise(branch):
                assert after.prompt.startswith(before.prompt + before.answer)
        assert len({branch[0].prompt for branch in branches}) == 4
        assert join.then is None
        assert join.prompt.startswith(said)
        ends = sum(branch[-1].output_tokens for branch in branches)
        assert join.prompt_tokens == root.prompt_tokens + root.output_tokens + ends + 8


def test_the_last_call_is_made_once_however_the_branches_end():
    (root,) = islice(TREE.calls(1), 1)
    joins = {
        grown(root_again, order)[1].prompt for order in range(6) for root_again in islice(TREE.calls(1), 1)
    }
    assert len(joins) == 1
    assert joins.pop().startswith(root.prompt)


def test_branches_start_at_once_and_wait_for_tools_in_between():
    workload = Agents(system_prompt_len=10, task_len=4, step_len=4, output_len=4, levels=4, tool_s=3.0)
    waits, firsts = [], []
    for root in islice(workload.calls(0), 200):
        firsts += [wait_s for wait_s, _ in root.then()]
        waits += [wait_s for wait_s in grown(root)[2] if wait_s]
    assert set(firsts) == {0.0}
    assert len(waits) > 500
    assert sum(waits) / len(waits) == pytest.approx(3.0, rel=0.1)
