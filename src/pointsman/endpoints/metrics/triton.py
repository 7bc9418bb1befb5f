"""Triton with the TensorRT-LLM backend, and Triton alone (llm-d facts 6)."""

from pointsman.endpoints.metrics.mapping import EngineMetrics

ENGINE = EngineMetrics(
    engine="triton-tensorrt-llm",
    recognise="nv_trt_llm_request_metrics",
    waiting="nv_trt_llm_request_metrics{request_type=waiting}",
    running="nv_trt_llm_request_metrics{request_type=scheduled}",
    kv_usage="nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=fraction}",
    block_tokens="nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=tokens_per}",
    kv_blocks="nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=max}",
)

PLAIN = EngineMetrics(
    engine="triton",
    recognise="nv_inference_pending_request_count",
    waiting="nv_inference_pending_request_count",
    running="nv_inference_exec_count",
)
