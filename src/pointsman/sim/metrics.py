"""An engine's metrics page: a real vLLM's, line for line, with this engine's values in it.

``vllm_metrics.txt`` is the page of a vLLM 0.32.0 server. Families that a simulated engine has no value for
keep what that server said (Python's and HTTP's own) or zero.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Mapping
from functools import cache
from importlib.resources import files

from pointsman.sim.engine import Engine, EngineRequest, Ran

_SAMPLE = re.compile(r"^([a-z_:A-Z0-9]+)(?:\{(.*)\})? (\S+)$")
_VARYING = re.compile(r'(?:engine|model_name|le)="[^"]*",?')
TEMPLATE_MODEL = 'model_name="tiny"'


class Histogram:
    """Counts by upper bound."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: list[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def values(self) -> list[float]:
        """Cumulative counts, the count and the sum, in the page's order."""
        total = 0.0
        values = []
        for count in self._counts:
            total += count
            values.append(total)
        values += (total, self._sum)
        return values


class EngineMetrics:
    """What an engine has done so far, and the page that says so. Times are the engine's seconds."""

    def __init__(self, engine: Engine, model: str, max_model_len: int, started_unix_s: float) -> None:
        self._engine = engine
        self.ended = {"stop": 0, "length": 0, "abort": 0}
        self.rejected = 0
        self._generated = 0
        self._format, self._slots, self._histograms = _page(
            model, _cache_config(engine, max_model_len), started_unix_s
        )
        self._ttft = self._histograms["vllm:time_to_first_token_seconds"]
        self._itl = self._histograms["vllm:inter_token_latency_seconds"]
        self._iteration = self._histograms["vllm:iteration_tokens_total"]

    def ran(self, ran: Ran) -> None:
        """A run of steps is over."""
        each_s = ran.duration_s / ran.steps
        if ran.decoding:
            self._itl.observe(each_s, ran.steps * ran.decoding)
        generated = self._engine.generated_tokens
        self._iteration.observe((generated - self._generated) / ran.steps + ran.prefill_tokens, ran.steps)
        self._generated = generated

    def started(self, request: EngineRequest) -> None:
        """A first token is out."""
        self._ttft.observe(request.first_token_s - request.arrived_s)

    def finished(self, request: EngineRequest, reason: str, max_tokens: int) -> None:
        """A sequence has ended by itself."""
        self.ended[reason] += 1
        decode_s = request.ended_s - request.first_token_s
        prefill_s = request.first_token_s - request.scheduled_s
        seen = self._histograms
        for name, value in (
            ("e2e_request_latency_seconds", request.ended_s - request.arrived_s),
            ("request_queue_time_seconds", request.scheduled_s - request.arrived_s),
            ("request_prefill_time_seconds", prefill_s),
            ("request_decode_time_seconds", decode_s),
            ("request_inference_time_seconds", prefill_s + decode_s),
            ("request_time_per_output_token_seconds", decode_s / max(1, request.output_tokens - 1)),
            ("request_prompt_tokens", request.prompt_tokens),
            ("request_generation_tokens", request.output_tokens),
            ("request_max_num_generation_tokens", request.output_tokens),
            ("request_params_max_tokens", max_tokens),
            ("request_params_n", 1),
            ("request_num_preemptions", request.preemptions),
            ("request_prefill_kv_computed_tokens", request.prompt_tokens - request.cached_tokens),
        ):
            seen[f"vllm:{name}"].observe(value)

    def page(self) -> bytes:
        """The page as it is served."""
        values: list[float] = []
        for slot in self._slots:
            if isinstance(slot, Histogram):
                values += slot.values()
            else:
                values.append(slot(self, self._engine))
        return (self._format % tuple(values)).encode()


Value = Callable[[EngineMetrics, Engine], float]


def _ended(reason: str) -> Value:
    return lambda metrics, engine: float(metrics.ended[reason])


def _hits(metrics: EngineMetrics, engine: Engine) -> float:
    return float(engine.cache_hits_tokens)


def _fetched(metrics: EngineMetrics, engine: Engine) -> float:
    return float(engine.fetched_tokens)


def _waiting(metrics: EngineMetrics, engine: Engine) -> float:
    return float(len(engine.waiting))


_LIVE: Mapping[str, Value] = {
    "vllm:num_requests_running": lambda m, e: float(len(e.running)),
    "vllm:num_requests_waiting": _waiting,
    'vllm:num_requests_waiting_by_reason{reason="capacity"}': _waiting,
    "vllm:kv_cache_usage_perc": lambda m, e: e.kv_usage,
    "vllm:prefix_cache_queries_total": lambda m, e: float(e.cache_queries_tokens),
    "vllm:prefix_cache_hits_total": _hits,
    "vllm:num_preemptions_total": lambda m, e: float(e.preemptions),
    "vllm:prompt_tokens_total": lambda m, e: float(e.prompt_tokens),
    'vllm:prompt_tokens_by_source_total{source="local_compute"}': lambda m, e: float(
        max(0, e.prompt_tokens - e.cache_hits_tokens - e.fetched_tokens)
    ),
    'vllm:prompt_tokens_by_source_total{source="local_cache_hit"}': _hits,
    "vllm:external_prefix_cache_queries_total": lambda m, e: float(
        e.cache_queries_tokens - e.cache_hits_tokens if e.cpu_tier else 0
    ),
    "vllm:external_prefix_cache_hits_total": _fetched,
    'vllm:prompt_tokens_cached_by_source_total{source="host"}': _fetched,
    "vllm:prompt_tokens_cached_total": lambda m, e: float(e.cache_hits_tokens + e.fetched_tokens),
    'vllm:prompt_tokens_cached_by_source_total{source="device"}': _hits,
    "vllm:generation_tokens_total": lambda m, e: float(e.generated_tokens),
    'vllm:request_success_total{finished_reason="stop"}': _ended("stop"),
    'vllm:request_success_total{finished_reason="length"}': _ended("length"),
    'vllm:request_success_total{finished_reason="abort"}': _ended("abort"),
    'vllm:admission_rejections_total{reason="max_num_queued_reqs"}': lambda m, e: float(m.rejected),
}
"""Sample to value; labels that only tell engine, model or bucket are left out of the name."""

_AWAKE = 'vllm:engine_sleep_state{sleep_state="awake"}'


def _cache_config(engine: Engine, max_model_len: int) -> Mapping[str, str]:
    p = engine.parameters
    return {
        "block_size": str(p.block_tokens),
        "effective_attention_block_size": str(p.block_tokens),
        "enable_prefix_caching": str(p.prefix_caching),
        "num_gpu_blocks": str(p.kv_blocks),
        "kv_cache_size_tokens": str(p.kv_blocks * p.block_tokens),
        "kv_cache_max_concurrency": str(p.kv_tokens / max_model_len),
    }


@cache
def _template() -> str:
    return files("pointsman.sim").joinpath("vllm_metrics.txt").read_text(encoding="utf-8")


def _page(
    model: str, cache_config: Mapping[str, str], started_unix_s: float
) -> tuple[str, list[Histogram | Value], dict[str, Histogram]]:
    """The page as a format string, what fills its slots in order, and the histograms among them by name."""
    lines: list[str] = []
    slots: list[Histogram | Value] = []
    histograms: dict[str, Histogram] = {}
    bounds: list[float] = []
    escaped = model.replace("\\", r"\\").replace('"', r"\"").replace("%", "%%")
    model_label = f'model_name="{escaped}"'
    for line in _template().splitlines():
        sample = None if line.startswith("#") else _SAMPLE.match(line)
        if sample is None or not line.startswith(("vllm:", "process_start_time")):
            lines.append(line.replace("%", "%%"))
            continue
        name, labels, value = sample[1], sample[2] or "", sample[3]
        head = line[: sample.start(3)].replace(TEMPLATE_MODEL, model_label)
        rest = _VARYING.sub("", labels).rstrip(",")
        key = f"{name}{{{rest}}}" if rest else name
        if name.endswith("_created") or name == "process_start_time_seconds":
            value = repr(started_unix_s)
        elif name == "vllm:cache_config_info":
            for label, said in cache_config.items():
                head = re.sub(rf'([{{,]{label}=")[^"]*"', rf'\g<1>{said}"', head)
        elif name.endswith("_bucket"):
            bound = re.search(r'le="([^"]*)"', labels)
            assert bound is not None
            if bound[1] != "+Inf":
                bounds.append(float(bound[1]))
            value = "%s"
        elif name.endswith("_count"):
            histogram = histograms[name.removesuffix("_count")] = Histogram(bounds)
            slots.append(histogram)
            bounds = []
            value = "%s"
        elif name.endswith("_sum"):
            value = "%s"
        elif key in _LIVE:
            slots.append(_LIVE[key])
            value = "%s"
        else:
            value = "1.0" if key == _AWAKE else "0.0"
        lines.append(f"{head}{value}")
    return "\n".join(lines) + "\n", slots, histograms
