"""Report figures against values worked out by hand."""

import pytest

from pointsman.bench.client import Record
from pointsman.bench.histogram import percentiles
from pointsman.bench.report import Bill, Slo, is_good, steady_tok_s, summarise, tpot_s
from pointsman.bench.stream import Gaps
from pointsman.types import Usage


def record(due=0.0, sent=None, first=1.0, last=2.0, end=None, tokens=11, events=None, **more):
    usage = more.pop("usage", Usage(100, tokens, None))
    return Record(
        due_s=due,
        sent_s=due if sent is None else sent,
        first_s=first,
        last_s=last,
        end_s=last if end is None else end,
        events=tokens if events is None else events,
        usage=usage,
        **more,
    )


def stage(*records, **more):
    return summarise("rate 1", records, Gaps(), **more)


def test_tpot_is_the_mean_gap_after_the_first_token():
    assert tpot_s(record(first=1.0, last=2.0, tokens=11)) == pytest.approx(0.1)


def test_tpot_goes_by_tokens_where_events_hold_several():
    assert tpot_s(record(first=1.0, last=4.0, tokens=101, events=5)) == pytest.approx(0.03)


@pytest.mark.parametrize("one", [record(tokens=1), record(tokens=50, events=1)])
def test_one_event_has_no_tpot(one):
    assert tpot_s(one) is None


def test_throughput_by_makespan_includes_the_drain():
    found = stage(
        record(due=10.0, first=10.5, last=12.0, tokens=30), record(due=11.0, first=11.5, last=30.0, tokens=70)
    )
    assert (found.makespan_s, found.output_tokens, found.output_tok_s) == (20.0, 100, 5.0)
    assert (found.requests_s, found.send_s, found.achieved_rate) == (0.1, 1.0, 1.0)


def test_failed_requests_give_no_tokens_and_no_latency_and_do_not_stretch_the_makespan():
    bad = record(due=0.0, first=0.0, last=0.0, end=500.0, tokens=0, error="timeout", detail="gone")
    found = stage(record(due=0.0, last=2.0, tokens=20), bad, bad)
    assert (found.requests, found.ok, found.errors) == (3, 1, {"timeout": 2})
    assert found.error_details == {"timeout": "gone"}
    assert (found.makespan_s, found.output_tokens, found.ttft.count) == (2.0, 20, 1)


def test_steady_throughput_is_what_streamed_while_load_was_on():
    # Sent at 0 and 8: the window is 2 to 8. The first streams 100 tokens over 1..11, so 60 of them in the
    # window; the second starts at 9, after it.
    assert (
        steady_tok_s([record(0.0, first=1.0, last=11.0, tokens=100), record(8.0, first=9.0, last=10.0)])
        == 10.0
    )
    assert steady_tok_s([record()]) is None


def test_ttft_counts_from_due_and_from_sent():
    found = stage(record(due=1.0, sent=3.0, first=3.5))
    assert found.ttft.p50 == pytest.approx(2.5, rel=1e-3)
    assert found.ttft_sent.p50 == pytest.approx(0.5, rel=1e-3)
    assert found.late.p50 == pytest.approx(2.0, rel=1e-3)
    assert found.e2e.p50 == pytest.approx(1.0, rel=1e-3)


def test_prefix_hit_rate_is_by_tokens_of_those_that_tell():
    found = stage(
        record(usage=Usage(1000, 5, 900)), record(usage=Usage(3000, 5, 0)), record(usage=Usage(500, 5, None))
    )
    assert (found.prefix_hit_rate, found.cached_tokens, found.prompt_tokens) == (900 / 4000, 900, 4500)
    assert stage(record()).prefix_hit_rate is None


def test_goodput_counts_requests_within_both_limits_among_all():
    quick = record(due=0.0, first=0.2, last=1.2, tokens=11)
    late = record(due=0.0, first=3.0, last=4.0, tokens=11)
    slow = record(due=0.0, first=0.2, last=10.2, tokens=11)
    failed = record(error="reset")
    slo = Slo(ttft_s=1.0, tpot_s=0.5)
    assert [is_good(r, slo) for r in (quick, late, slow, failed)] == [True, False, False, False]
    found = stage(quick, late, slow, failed, slo=slo)
    assert found.within_slo == 0.25
    assert found.goodput == pytest.approx(1 / 10.2)
    assert stage(quick).goodput is None


def test_tokens_for_what_the_makespan_costs():
    bill = Bill(price_per_hour=7.2, watts=1000.0)
    found = stage(record(), record(), bill=bill)
    assert found.tokens_per_unit == pytest.approx(22 / (2 * 7.2 / 3600))
    assert found.tokens_per_kwh == pytest.approx(22 / (2 * 1000 / 3.6e6))
    without = stage(record())
    assert (without.tokens_per_unit, without.tokens_per_kwh) == (None, None)


def test_requests_are_counted_by_the_endpoint_that_answered():
    found = stage(record(endpoint="b"), record(endpoint="a"), record(endpoint="b"), record())
    assert found.endpoints == {"a": 1, "b": 2}


def test_percentiles_are_those_of_the_values():
    found = percentiles([i / 1000 for i in range(1, 1001)])
    assert (found.count, found.max) == (1000, 1.0)
    assert found.mean == pytest.approx(0.5005)
    assert [found.p50, found.p90, found.p99] == pytest.approx([0.5, 0.9, 0.99], rel=2e-3)
    assert percentiles([]) is None


def test_counted_values_weigh_as_often_as_they_came():
    found = percentiles([], {1000: 99, 1_000_000: 1})
    assert found.count == 100
    assert found.p50 == pytest.approx(0.001, rel=1e-3)
    assert found.max == 1.0
    assert found.mean == pytest.approx((99 * 0.001 + 1) / 100)
