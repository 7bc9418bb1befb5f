"""SGLang's metric names (llm-d facts 6)."""

from pointsman.endpoints.metrics.mapping import EngineMetrics

ENGINE = EngineMetrics(
    engine="sglang",
    recognise="sglang:num_running_reqs",
    waiting="sglang:num_queue_reqs",
    running="sglang:num_running_reqs",
    kv_usage="sglang:token_usage",
    cache_info="sglang:cache_config_info",
    rank_label="dp_rank",
    block_tokens_label="page_size",
    kv_blocks_label="num_pages",
    prefix_queries="sglang:prompt_tokens_total",
    prefix_hits="sglang:cached_tokens_total",
    generation_tokens="sglang:generation_tokens_total",
    ttft="sglang:time_to_first_token_seconds",
    ended="sglang:num_requests_total",
)
