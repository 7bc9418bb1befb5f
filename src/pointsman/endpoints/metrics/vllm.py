"""vLLM's metric names (0.32.0, and the v1 engine before it)."""

from pointsman.endpoints.metrics.mapping import EngineMetrics

ENGINE = EngineMetrics(
    engine="vllm",
    recognise="vllm:num_requests_running",
    waiting="vllm:num_requests_waiting",
    running="vllm:num_requests_running",
    kv_usage="vllm:kv_cache_usage_perc",
    lora="vllm:lora_requests_info",
    cache_info="vllm:cache_config_info",
    prefix_queries="vllm:prefix_cache_queries_total",
    prefix_hits="vllm:prefix_cache_hits_total",
    generation_tokens="vllm:generation_tokens_total",
    preemptions="vllm:num_preemptions_total",
    ttft="vllm:time_to_first_token_seconds",
    ended="vllm:request_success_total",
)
