"""Counters and histograms of requests, kept as plain numbers and turned into Prometheus families when
scraped.

Labels are bounded: endpoints of the pool, models that endpoints serve, our own reasons.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from pointsman.types import Decision, InferenceRequest, Outcome

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

Labels = tuple[str, ...]


class Histogram:
    """Counts per bucket, by labels."""

    __slots__ = ("bounds", "rows")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.rows: dict[Labels, list[float]] = {}
        """Per label values: a count per bucket, one for +Inf, and the sum."""

    def observe(self, labels: Labels, value: float) -> None:
        row = self.rows.get(labels)
        if row is None:
            row = self.rows[labels] = [0.0] * (len(self.bounds) + 2)
        row[bisect_left(self.bounds, value)] += 1
        row[-1] += value

    def family(self, name: str, text: str, labels: Sequence[str]) -> HistogramMetricFamily:
        family = HistogramMetricFamily(name, text, labels=labels)
        for values, row in self.rows.items():
            total = 0.0
            buckets = []
            for bound, count in zip((*map(str, self.bounds), "+Inf"), row, strict=False):
                total += count
                buckets.append((bound, total))
            family.add_metric(values, buckets, row[-1])
        return family


Gauges = Callable[[], Iterable[Metric]]
"""Further families, asked for at each scrape: the pool's state, the index's size."""


class Telemetry(Collector):
    """An observer of requests and a source of Prometheus families."""

    def __init__(self, gauges: Gauges = tuple) -> None:
        self._gauges = gauges
        self._requests: dict[Labels, float] = {}
        self._retries: dict[Labels, float] = {}
        self._tokens: dict[Labels, float] = {}
        self._ttft = Histogram(SECONDS)
        self._duration = Histogram(SECONDS)
        self._input = Histogram(TOKENS)
        self._output = Histogram(TOKENS)
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def __call__(self, request: InferenceRequest, decision: Decision | None, outcome: Outcome) -> None:
        model = decision.model if decision else ""
        endpoint = outcome.endpoint
        key = (model, endpoint, str(outcome.status), outcome.ending._value_, outcome.reason)
        self._requests[key] = self._requests.get(key, 0.0) + 1
        if decision is None:
            return
        labels = (model, endpoint)
        for tried in decision.tried:
            self._retries[(tried,)] = self._retries.get((tried,), 0.0) + 1
        if outcome.ttft_s is not None:
            self._ttft.observe(labels, outcome.ttft_s)
        self._duration.observe(labels, outcome.duration_s)
        usage = outcome.usage
        if usage.prompt_tokens is not None:
            self._input.observe(labels, usage.prompt_tokens)
            self._count("prompt", endpoint, usage.prompt_tokens)
        if usage.output_tokens is not None:
            self._output.observe(labels, usage.output_tokens)
            self._count("output", endpoint, usage.output_tokens)
        if usage.cached_tokens is not None:
            self._count("cached", endpoint, usage.cached_tokens)
        self._count("estimated_prompt", endpoint, decision.prompt_tokens)
        self._count("estimated_cached", endpoint, decision.matched_tokens)

    def _count(self, kind: str, endpoint: str, tokens: int) -> None:
        key = (endpoint, kind)
        self._tokens[key] = self._tokens.get(key, 0.0) + tokens

    def collect(self) -> Iterator[Metric]:
        per_model = ("model", "endpoint")
        yield _counter(
            "pointsman_requests",
            "Requests by how they ended.",
            (*per_model, "status", "ending", "reason"),
            self._requests,
        )
        yield _counter(
            "pointsman_retries",
            "Requests that had to leave an endpoint for another.",
            ("endpoint",),
            self._retries,
        )
        yield _counter(
            "pointsman_tokens",
            "Tokens as engines reported them (prompt, cached, output) and as we estimated them.",
            ("endpoint", "kind"),
            self._tokens,
        )
        yield self._ttft.family("pointsman_ttft_seconds", "Arrival to first body byte.", per_model)
        yield self._duration.family("pointsman_request_duration_seconds", "Arrival to end.", per_model)
        yield self._input.family("pointsman_request_prompt_tokens", "Prompt tokens, reported.", per_model)
        yield self._output.family("pointsman_request_output_tokens", "Output tokens, reported.", per_model)
        yield from self._gauges()

    def page(self) -> bytes:
        """The /metrics page."""
        return generate_latest(self._registry)


def _counter(name: str, text: str, labels: Sequence[str], rows: dict[Labels, float]) -> CounterMetricFamily:
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
