"""llama.cpp's server (started with --metrics)."""

from pointsman.endpoints.metrics.mapping import EngineMetrics

ENGINE = EngineMetrics(
    engine="llama.cpp",
    recognise="llamacpp:requests_processing",
    waiting="llamacpp:requests_deferred",
    running="llamacpp:requests_processing",
    kv_usage="llamacpp:kv_cache_usage_ratio",
)
