"""Counters and histograms of requests, kept as plain numbers and turned into Prometheus families when
scraped.

Labels are bounded: endpoints of the pool, models that endpoints serve, our own reasons.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from pointsman.types import Decision, Ending, InferenceRequest, Outcome, Prediction

SECONDS = (
    0.001,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    120.0,
    300.0,
    600.0,
)
TOKENS = (1.0, 8.0, 32.0, 128.0, 512.0, 2048.0, 8192.0, 32768.0, 131072.0, 524288.0)

RATIOS = (0.25, 0.5, 0.67, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0)

Labels = tuple[str, ...]


class Series:
    """All we count for one set of labels."""

    __slots__ = (
        "cached",
        "duration",
        "estimated_cached",
        "estimated_prompt",
        "output",
        "prompt",
        "requests",
        "tpot_ratio",
        "ttft",
        "ttft_ratio",
    )

    def __init__(self) -> None:
        self.requests = 0
        self.ttft = Histogram(SECONDS)
        self.duration = Histogram(SECONDS)
        self.ttft_ratio = Histogram(RATIOS)
        self.tpot_ratio = Histogram(RATIOS)
        self.prompt = Histogram(TOKENS)
        self.output = Histogram(TOKENS)
        self.cached = 0
        self.estimated_prompt = 0
        self.estimated_cached = 0


class Histogram:
    """Counts per bucket, the last for +Inf, and the sum."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def add(self, other: Histogram) -> None:
        self.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        self.sum += other.sum

    def buckets(self) -> list[tuple[str, float]]:
        """As Prometheus wants them: cumulative."""
        return list(zip((*map(str, self.bounds), "+Inf"), accumulate(self.counts), strict=True))


Gauges = Callable[[], Iterable[Metric]]
"""Further families, asked for at each scrape: the pool's state, the index's size."""


class Telemetry(Collector):
    """An observer of requests and a source of Prometheus families."""

    def __init__(self, gauges: Gauges = tuple) -> None:
        self._gauges = gauges
        self._series: dict[tuple[str, str, int, str, str], Series] = {}
        """By model, endpoint, status, ending and reason."""
        self._retries: Counter[str] = Counter()
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def __call__(self, request: InferenceRequest, decision: Decision | None, outcome: Outcome) -> None:
        model = ""
        if decision and decision.model in (decision.chosen.models or ()):
            model = decision.model  # a client may invent others; they must not grow the page
        key = (model, outcome.endpoint, outcome.status, outcome.ending._value_, outcome.reason)
        series = self._series.get(key)
        if series is None:
            series = self._series[key] = Series()
        series.requests += 1
        if decision is None:
            return
        if decision.tried:
            self._retries.update(decision.tried)
        series.estimated_prompt += decision.prompt_tokens
        series.estimated_cached += decision.matched_tokens
        series.duration.observe(outcome.duration_s)
        if outcome.ttft_s is not None:
            series.ttft.observe(outcome.ttft_s)
        usage = outcome.usage
        if usage.prompt_tokens is not None:
            series.prompt.observe(usage.prompt_tokens)
        if usage.output_tokens is not None:
            series.output.observe(usage.output_tokens)
        if usage.cached_tokens is not None:
            series.cached += usage.cached_tokens
        if decision.predicted and request.stream:
            _compare(series, request, decision.predicted, outcome)

    def forget(self, endpoint: str) -> None:
        """The endpoint has left the pool: its series end."""
        self._series = {key: series for key, series in self._series.items() if key[1] != endpoint}
        self._retries.pop(endpoint, None)

    def output_tokens(self, endpoint: str) -> int:
        """Of requests of ours there, as the engine reported them."""
        return int(sum(series.output.sum for key, series in self._series.items() if key[1] == endpoint))

    def collect(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "pointsman_requests",
            "Requests by how they ended.",
            labels=("model", "endpoint", "status", "ending", "reason"),
        )
        tokens: Counter[Labels] = Counter()
        summed: dict[Labels, Series] = {}
        for (model, endpoint, status, ending, reason), series in self._series.items():
            requests.add_metric((model, endpoint, str(status), ending, reason), series.requests)
            if not endpoint:
                continue
            into = summed.setdefault((model, endpoint), Series())
            for name in ("ttft", "duration", "prompt", "output", "ttft_ratio", "tpot_ratio"):
                getattr(into, name).add(getattr(series, name))
            tokens[endpoint, "prompt"] += int(series.prompt.sum)
            tokens[endpoint, "output"] += int(series.output.sum)
            tokens[endpoint, "cached"] += series.cached
            tokens[endpoint, "estimated_prompt"] += series.estimated_prompt
            tokens[endpoint, "estimated_cached"] += series.estimated_cached
        yield requests
        yield counter(
            "pointsman_retries",
            "Requests that had to leave an endpoint for another.",
            ("endpoint",),
            {(name,): count for name, count in self._retries.items()},
        )
        yield counter(
            "pointsman_tokens",
            "Tokens as engines reported them (prompt, cached, output) and as we estimated them.",
            ("endpoint", "kind"),
            tokens,
        )
        for name, field, text in (
            ("pointsman_ttft_seconds", "ttft", "Arrival to first body byte."),
            ("pointsman_request_duration_seconds", "duration", "Arrival to end."),
            ("pointsman_request_prompt_tokens", "prompt", "Prompt tokens, as the engine reported them."),
            ("pointsman_request_output_tokens", "output", "Output tokens, as the engine reported them."),
            (
                "pointsman_ttft_to_predicted",
                "ttft_ratio",
                "Decision to first body byte of streams, divided by what the policy had predicted.",
            ),
            (
                "pointsman_tpot_to_predicted",
                "tpot_ratio",
                "Time per output token of streams that told their tokens, divided by what was predicted.",
            ),
        ):
            family = HistogramMetricFamily(name, text, labels=("model", "endpoint"))
            for labels, series in summed.items():
                histogram: Histogram = getattr(series, field)
                if not any(histogram.counts):
                    continue
                family.add_metric(labels, histogram.buckets(), histogram.sum)
            yield family
        yield from self._gauges()

    def page(self) -> bytes:
        """The /metrics page."""
        return generate_latest(self._registry)


def _compare(series: Series, request: InferenceRequest, predicted: Prediction, outcome: Outcome) -> None:
    """How long a stream took for what was predicted, if it went well."""
    ttft_s, tokens = outcome.ttft_s, outcome.usage.output_tokens
    if ttft_s is None or outcome.ending is not Ending.OK:
        return
    expected_s = predicted.queue_s + predicted.prefill_s
    if expected_s > 0:
        series.ttft_ratio.observe((ttft_s - outcome.decided_s) / expected_s)
    if tokens and tokens > 1 and request.n == 1 and predicted.step_s > 0:
        tpot_s = (outcome.duration_s - ttft_s) / (tokens - 1)
        series.tpot_ratio.observe(tpot_s / predicted.step_s)


def counter(name: str, text: str, labels: Sequence[str], rows: Mapping[Labels, float]) -> CounterMetricFamily:
    """A counter family from label values and their counts."""
    family = CounterMetricFamily(name, text, labels=labels)
    for values, count in rows.items():
        family.add_metric(values, count)
    return family


def gauge(
    name: str, text: str, labels: Sequence[str], rows: Iterable[tuple[Labels, float]]
) -> GaugeMetricFamily:
    """A gauge family from rows of label values and a value."""
    family = GaugeMetricFamily(name, text, labels=labels)
    for values, value in rows:
        family.add_metric(values, value)
    return family
