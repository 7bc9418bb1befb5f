"""Traces in Mooncake's format."""

import json

import pytest

from pointsman.bench.workloads import Trace
from pointsman.errors import SettingsError


def trace(tmp_path, *rows, **parameters):
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return Trace(str(path), **parameters)


def row(ms, tokens, output, ids):
    return {"timestamp": ms, "input_length": tokens, "output_length": output, "hash_ids": ids}


def test_a_trace_shares_the_prefixes_that_its_hash_ids_share(tmp_path):
    recorded = trace(
        tmp_path,
        row(1000, 1200, 10, [7, 8, 9]),
        row(1500, 1100, 20, [7, 8, 10]),
        row(3000, 100, 30, ["ab"]),
        row(3500, 600, 40, []),
    )
    a, b, c, d = recorded.calls(0)
    assert [len(call.prompt) for call in (a, b, c, d)] == [4800, 4400, 400, 2400]
    assert [call.output_tokens for call in (a, b, c, d)] == [10, 20, 30, 40]
    assert a.prompt[:4096] == b.prompt[:4096]
    assert a.prompt[4096:4200] != b.prompt[4096:4200]
    assert a.prompt[:2048] != a.prompt[2048:4096]
    assert [call.at_s for call in (a, b, c, d)] == [0.0, 0.5, 2.0, 2.5]
    assert list(recorded.calls(0)) == [a, b, c, d]
    assert next(recorded.calls(1)).prompt != a.prompt


def test_a_trace_is_in_the_order_of_time_and_can_be_replayed_faster(tmp_path):
    rows = row(4000, 10, 1, [1]), row(0, 10, 1, [2]), row(9000, 10, 1, [3])
    assert [call.at_s for call in trace(tmp_path, *rows, faster=2.0).calls(0)] == [0.0, 2.0, 4.5]


def test_a_trace_may_tell_the_lengths_of_outputs(tmp_path):
    recorded = trace(tmp_path, row(0, 10, 7, [1]), tell_max_tokens=True)
    assert [call.max_tokens for call in recorded.calls(0)] == [7]


def test_a_trace_that_cannot_be_used_says_so_at_once_and_names_the_line(tmp_path):
    with pytest.raises(SettingsError, match=r"line 2.*input_length"):
        trace(tmp_path, row(0, 10, 1, [1]), {"timestamp": 1}).calls(0)
    with pytest.raises(SettingsError, match="No such file"):
        Trace(str(tmp_path / "none")).calls(0)
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(SettingsError, match="no requests"):
        Trace(str(tmp_path / "empty")).calls(0)
    with pytest.raises(SettingsError, match=r"^faster: must be above 0"):
        Trace("x", faster=0.0)
