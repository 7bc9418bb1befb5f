"""Text and charts of a report."""

import pytest

from pointsman.bench.client import Record
from pointsman.bench.plot import check_plot, plot
from pointsman.bench.report import Bill, Slo, summarise
from pointsman.bench.stream import Gaps
from pointsman.bench.table import bars, columns, remarks, seconds, stages_table
from pointsman.errors import SettingsError


def test_columns_align():
    assert (
        columns([["", "long title"], ["a", "1"], ["bcd", "22"]])
        == "     long title\na             1\nbcd          22"
    )


def test_bars_are_in_proportion():
    lines = bars([("one", 10, "10"), ("three", 30, "30"), ("none", 0, "0")], width=30).split("\n")
    assert [line.count("█") for line in lines] == [10, 30, 0]


@pytest.mark.parametrize(
    ("value", "text"), [(0.00851, "8.51 ms"), (1.234, "1.23 s"), (1234.5, "1234 s"), (None, "-")]
)
def test_seconds_have_three_digits(value, text):
    assert seconds(value) == text


def test_the_table_has_a_line_a_stage_and_goodput_when_asked():
    plain = summarise("rate 5", [Record(due_s=0, sent_s=0, first_s=1, last_s=2, end_s=2, events=5)], Gaps())
    with_slo = summarise("rate 6", [Record(due_s=0, sent_s=0)], Gaps(), Slo(ttft_s=1.0))
    assert "goodput" not in stages_table([plain])
    lines = stages_table([plain, with_slo]).split("\n")
    assert [line.split("  ")[0] for line in lines[1:]] == ["rate 5", "rate 6"]
    assert "goodput" in lines[0]


def test_what_tokens_cost_is_shown_when_told():
    records = [Record(due_s=0, sent_s=0, first_s=1, last_s=2, end_s=2, events=5)]
    head, line = stages_table([summarise("rate 5", records, Gaps(), bill=Bill(1.8, 100.0))]).split("\n")
    assert head.split()[-2:] == ["tok/unit", "tok/kWh"]
    assert line.split()[-2:] == ["5,000", "90,000"]
    assert "tok/unit" not in stages_table([summarise("rate 5", records, Gaps())])


def test_remarks_name_failures_and_endpoints():
    records = [
        Record(due_s=0, sent_s=0, error="status 503", detail="full\n"),
        Record(due_s=0, sent_s=0, endpoint="a"),
    ]
    assert remarks([summarise("rate 5", records, Gaps())]) == [
        "rate 5: 1 x status 503: full",
        "rate 5: answered by a 50.0%",
    ]


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_a_plot_is_written(tmp_path, suffix):
    path = tmp_path / f"chart.{suffix}"
    stage = summarise("rate 5", [Record(due_s=0, sent_s=0, first_s=1, last_s=2, end_s=2, events=5)], Gaps())
    plot([stage, stage], str(path))
    assert path.stat().st_size > 5000


def test_a_plot_of_an_unknown_kind_is_refused_before_the_run():
    with pytest.raises(SettingsError, match=r"--plot: a.gif: must end in .svg or .png"):
        check_plot("a.gif")
