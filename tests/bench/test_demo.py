"""What the demonstration says of its runs."""

from msgspec import structs

from pointsman.bench.client import Record
from pointsman.bench.demo import Measured, Scenario
from pointsman.bench.demo_report import chart, learned, table, terminal_chart
from pointsman.bench.report import summarise
from pointsman.bench.site import Lag
from pointsman.bench.stream import Gaps


def measured(policy="random", lag_s=0.0, ttft_s=1.0):
    record = Record(due_s=0, sent_s=0, first_s=ttft_s, last_s=ttft_s + 1, end_s=ttft_s + 1, events=5)
    return Measured(
        policy=policy,
        stage=summarise("rate 85", [record], Gaps()),
        accelerators={"h100-nvl": 1, "gaudi3": 0},
        lags={"fleet": Lag(lag_s, 0.3), "router": Lag(0.0, 0.2)},
        step_s=0.004,
    )


def test_a_step_scales_with_the_speed():
    slow, fast = Scenario(speed=1.0), Scenario(speed=10.0)
    # a + b n + c context of the README's three sets at 40 sequences of 7,700 tokens, weighted 4, 8, 8.
    steps = (
        0.00783 + 40 * 17e-6 + 308_000 * 74.8e-9,
        0.00613 + 40 * 19.6e-6 + 308_000 * 50.1e-9,
        0.0098 + 40 * 84e-6 + 308_000 * 168.1e-9,
    )
    assert abs(slow.step_s() - (4 * steps[0] + 8 * steps[1] + 8 * steps[2]) / 20) < 1e-9
    assert abs(fast.step_s() - slow.step_s() / 10) < 1e-12


def test_a_process_that_lagged_a_tenth_of_a_step_makes_the_run_void():
    assert measured(lag_s=0.0003).void() == []
    (reason,) = measured(lag_s=0.0005).void()
    assert reason == (
        "random: the fleet ran 0.50 ms late on average, more than a tenth of a scaled step (4.0 ms)"
    )


def test_the_table_has_a_line_a_policy_and_a_column_an_accelerator():
    lines = table([measured("random"), measured("Pointsman", ttft_s=0.1)]).split("\n")
    assert len(lines) == 3
    assert "to h100-nvl" in lines[0]
    assert lines[2].startswith("Pointsman")
    assert "100 ms" in lines[2]


def test_what_was_learned_is_told_beside_what_is_true():
    true_s = {"h100-nvl": 0.03, "mi325x": 0.02, "gaudi3": 0.06}
    assert learned(measured(), true_s) == ""
    found = structs.replace(measured(), learned={"gaudi3": 0.05, "mi325x": 0.025, "h100-nvl": 0.03})
    assert learned(found, true_s) == (
        "learned: beside h100-nvl, mi325x 1.2x and gaudi3 0.6x as quick (decode steps at 40 sequences; "
        "simulated as 1.5x and 0.5x)"
    )


def test_the_terminal_chart_is_in_proportion():
    lines = terminal_chart([measured("slow", ttft_s=3.0), measured("fast", ttft_s=0.3)]).split("\n")
    p50 = lines[lines.index("Time to first token, p50 (less is better)") + 1 :][:2]
    assert p50[0].count("█") == 10 * p50[1].count("█") == 50


def test_the_chart_is_written_in_every_form(tmp_path):
    paths = [str(tmp_path / name) for name in ("a.svg", "a.png")]
    chart([measured("random"), measured("Pointsman")], paths)
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
