"""What is required of pickers and cannot be tried from outside, without Kubernetes."""

from __future__ import annotations

from pointsman.conformance.case import LLMD, LLMD_TESTS, not_tried

KUBERNETES = "needs Kubernetes objects"

not_tried("rewrite-object", "InferenceModelRewrite objects rewrite models.", LLMD_TESTS, KUBERNETES)
not_tried(
    "objective-priority", "A request's priority is that of its InferenceObjective.", LLMD_TESTS, KUBERNETES
)
not_tried(
    "shed-when-saturated",
    "At saturation requests of negative priority are refused with 429.",
    LLMD_TESTS,
    f"{KUBERNETES}: without them every priority is 0",
)
not_tried(
    "evicted-under-way",
    "A request that flow control evicts after dispatch is answered with 429, the reason being evicted.",
    LLMD,
    f"{KUBERNETES}: without them every priority is 0",
)
not_tried("pods-followed", "Endpoints are the pods of the InferencePool.", LLMD_TESTS, KUBERNETES)
not_tried(
    "session-per-role",
    "Prefill and decode endpoints have session tokens of their own.",
    LLMD_TESTS,
    "needs a configuration with the P/D split, which the suite does not have",
)
not_tried(
    "vllm-grpc",
    "Requests of vLLM's gRPC API are read by their path, and their trailers answered with trailers.",
    LLMD_TESTS,
    "the suite does not have vLLM's messages; trailers are tried by request-trailers and response-trailers",
)
