"""trtllm-serve's metric names (llm-d facts 6)."""

from pointsman.endpoints.metrics.mapping import EngineMetrics

ENGINE = EngineMetrics(
    engine="trtllm-serve",
    recognise="trtllm_num_requests_running",
    waiting="trtllm_num_requests_waiting",
    running="trtllm_num_requests_running",
    kv_usage="trtllm_kv_cache_utilization",
    block_tokens="trtllm_kv_cache_tokens_per_block",
    kv_blocks="trtllm_kv_cache_max_blocks",
    ttft="trtllm_time_to_first_token_seconds",
    ended="trtllm_request_success_total",
)
