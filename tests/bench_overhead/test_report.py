"""Ratios, intervals and tables of bench/overhead."""

import random
import statistics

import pytest
from bench.overhead import report


def record(workload="W1", peer="envoy", round_="0", cpu_us=50.0, dropped="", faults=(), pair=0):
    quantiles = {"p50": 100, "p99": 300}
    return {
        "workload": workload,
        "peer": peer,
        "pair": pair,
        "round": round_,
        "cpu_us_per_unit": cpu_us,
        "units_per_s": 1000.0,
        "router_cores": 0.5,
        "client_cores": 0.3,
        "rss_mb": 50.0,
        "chunks_per_wakeup": 1.0,
        "chunks_per_read": 1.0,
        "scrapes_per_s": 2000.0,
        "client": {"latency_us": quantiles, "event_delay_us": quantiles},
        "dropped": dropped,
        "faults": list(faults),
    }


@pytest.mark.parametrize(
    ("count", "rank", "confidence"),
    [(2, 1, 0.5), (5, 1, 0.9375), (6, 1, 0.96875), (8, 1, 0.9921875), (9, 2, 0.9609375), (15, 4, 0.96484375)],
)
def test_interval_is_that_of_the_binomial_table(count, rank, confidence):
    interval = report.median_interval([float(x) for x in range(1, count + 1)])

    assert interval == report.Interval(float(rank), float(count + 1 - rank), confidence)


def test_interval_encloses_the_true_median_as_often_as_it_says():
    rng = random.Random(7)
    draws = [report.median_interval([rng.expovariate(1.0) for _ in range(9)]) for _ in range(4000)]

    hits = statistics.fmean(i.low <= 0.6931 <= i.high for i in draws)

    assert hits == pytest.approx(draws[0].confidence, abs=0.015)


def test_ratio_compares_only_runs_of_one_round():
    records = [
        record(peer="envoy", round_="a", cpu_us=50),
        record(peer="pointsman", round_="a", cpu_us=40),
        record(peer="envoy", round_="b", cpu_us=100),
        record(peer="pointsman", round_="b", cpu_us=60),
    ]

    compared = report.pairs(records, "W1", "pointsman", "envoy")

    assert [a["cpu_us_per_unit"] / b["cpu_us_per_unit"] for a, b in compared] == [0.8, 0.6]


@pytest.mark.parametrize("bad", [{"dropped": "foreign load 0.50 core"}, {"faults": ["3 answers incomplete"]}])
def test_round_with_a_bad_run_counts_for_none_and_is_listed(bad):
    records = [record(peer="envoy", round_="a", **bad), record(peer="pointsman", round_="a")]

    assert report.pairs(records, "W1", "pointsman", "envoy") == []
    (reason,) = [*bad.get("faults", []), *filter(None, [bad.get("dropped")])]
    assert f"- W1 envoy, pair 0: {reason}" in report.markdown({}, records)


def test_report_gives_ratio_with_its_interval():
    records = []
    for i, cpu_us in enumerate([40, 41, 42, 43, 44, 45]):
        records += [record(round_=str(i)), record(peer="pointsman", round_=str(i), cpu_us=cpu_us)]

    text = report.markdown({"machine": "a test"}, records)

    assert "- machine: a test" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| Pointsman, default")]
    assert "| 6 | 42.5 [40.0..45.0] | 0.85 [0.80..0.90] (97%) |" in row


def test_added_latency_is_the_difference_to_no_router():
    direct, routed = record("L1", "direct"), record("L1", "pointsman")
    routed["client"]["latency_us"] = {"p50": 250, "p99": 700}

    assert "| Pointsman, default | 1 | 150 (1 pair) | 400 (1 pair) |" in report.markdown({}, [direct, routed])


def test_scrapes_are_reported_in_cores_and_per_scrape():
    assert "| Pointsman, default | 1 | 0.500 | 2000 | 250.0 |" in report.markdown(
        {}, [record("SCRAPE", "pointsman")]
    )
