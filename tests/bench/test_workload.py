"""Workloads: equal seeds give equal calls, of the shape that was asked for."""

import json
from collections import Counter
from itertools import islice, pairwise
from random import Random

import pytest

from pointsman.bench.pace import ARRIVALS, poisson
from pointsman.bench.text import text
from pointsman.bench.trace import read_trace
from pointsman.bench.workload import SharedPrefix, Unrelated
from pointsman.errors import SettingsError

SMALL = SharedPrefix(groups=4, prompts_per_group=3, system_prompt_len=50, question_len=7, output_len=9)


def test_a_token_is_four_bytes():
    assert [len(text(Random(1), n)) for n in (0, 1, 1000)] == [0, 4, 4000]
    assert text(Random(1), 1000).isascii()


@pytest.mark.parametrize("workload", [SMALL, Unrelated(input_len=30, output_len=5, spread=0.5)])
def test_the_seed_decides_the_calls(workload):
    first, again, other = (list(islice(workload.calls(seed), 40)) for seed in (1, 1, 2))
    assert first == again
    assert first[:5] != other[:5]


def test_shared_prefix_prompts_share_exactly_their_system_prompt():
    calls = list(islice(SMALL.calls(0), 12))
    assert len({call.prompt for call in calls}) == 12
    assert Counter(call.group for call in calls) == {0: 3, 1: 3, 2: 3, 3: 3}
    assert {(len(c.prompt), c.prompt_tokens, c.output_tokens) for c in calls} == {(57 * 4, 57, 9)}
    starts = {(call.group, call.prompt[: 50 * 4]) for call in calls}
    assert len(starts) == 4
    assert len({start for _, start in starts}) == 4


def test_shared_prefix_prompts_are_shuffled_once_and_then_cycled():
    calls = list(islice(SMALL.calls(0), 36))
    assert calls[:12] == calls[12:24] == calls[24:]
    assert [call.group for call in calls[:12]] != sorted(call.group for call in calls[:12])


def test_unrelated_prompts_share_nothing_and_keep_to_their_spread():
    calls = list(islice(Unrelated(input_len=100, output_len=50, spread=0.2).calls(0), 300))
    assert len({call.prompt[:80] for call in calls}) == 300
    lengths = [call.prompt_tokens for call in calls]
    assert min(lengths) >= 80
    assert max(lengths) <= 120
    assert len(set(lengths)) > 20
    assert all(len(call.prompt) == 4 * call.prompt_tokens for call in calls)
    assert sum(call.output_tokens for call in calls) / 300 == pytest.approx(50, rel=0.05)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: SharedPrefix(groups=0), "groups"),
        (lambda: SharedPrefix(question_len=-1), "question_len"),
        (lambda: SharedPrefix(question_len=0, system_prompt_len=0), "system_prompt_len"),
        (lambda: Unrelated(input_len=0), "input_len"),
        (lambda: Unrelated(spread=1.0), "spread"),
    ],
)
def test_a_workload_that_cannot_be_names_its_parameter(make, names):
    with pytest.raises(SettingsError, match=names):
        make()


def _trace(tmp_path, *rows):
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return str(path)


def _row(ms, tokens, output, ids):
    return {"timestamp": ms, "input_length": tokens, "output_length": output, "hash_ids": ids}


def test_a_trace_shares_the_prefixes_that_its_hash_ids_share(tmp_path):
    path = _trace(
        tmp_path,
        _row(1000, 1200, 10, [7, 8, 9]),
        _row(1500, 1100, 20, [7, 8, 10]),
        _row(3000, 100, 30, ["ab"]),
        _row(3500, 600, 40, []),
    )
    a, b, c, d = read_trace(path).calls(0)
    assert [len(call.prompt) for call in (a, b, c, d)] == [4800, 4400, 400, 2400]
    assert [call.output_tokens for call in (a, b, c, d)] == [10, 20, 30, 40]
    assert a.prompt[:4096] == b.prompt[:4096]
    assert a.prompt[4096:4200] != b.prompt[4096:4200]
    assert a.prompt[:2048] != a.prompt[2048:4096]
    assert [call.at_s for call in (a, b, c, d)] == [0.0, 0.5, 2.0, 2.5]


def test_a_trace_can_be_replayed_faster_and_in_part(tmp_path):
    path = _trace(tmp_path, _row(4000, 10, 1, [1]), _row(0, 10, 1, [2]), _row(9000, 10, 1, [3]))
    assert [call.at_s for call in read_trace(path, faster=2.0, limit=2).calls(0)] == [0.0, 2.0]


def test_a_trace_that_cannot_be_read_names_the_line(tmp_path):
    path = _trace(tmp_path, _row(0, 10, 1, [1]), {"timestamp": 1})
    with pytest.raises(SettingsError, match=r"line 2.*input_length"):
        read_trace(path)
    with pytest.raises(SettingsError, match="No such file"):
        read_trace(str(tmp_path / "none"))
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(SettingsError, match="no requests"):
        read_trace(str(tmp_path / "empty"))


def test_arrivals_have_their_rate_and_come_in_order():
    due = list(poisson(Random(3), 20.0, 4000))
    assert due == sorted(due)
    assert due == list(poisson(Random(3), 20.0, 4000))
    assert due[-1] == pytest.approx(200, rel=0.05)
    gaps = [b - a for a, b in pairwise(due)]
    assert sum(gap > 0.05 for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.03)
    assert list(ARRIVALS["constant"](Random(), 4.0, 3)) == [0.0, 0.25, 0.5]
