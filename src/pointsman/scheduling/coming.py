"""llm-d's plugin types that we know by name and do not have yet. A configuration that uses one does not
start.
"""

from __future__ import annotations

from collections.abc import Mapping

_AREAS: Mapping[str, tuple[str, ...]] = {
    "flow control": (
        "global-strict-fairness-policy",
        "round-robin-fairness-policy",
        "program-aware-fairness",
        "fcfs-ordering-policy",
        "edf-ordering-policy",
        "slo-deadline-ordering-policy",
        "static-usage-limit-policy",
        "priority-holdback-policy",
        "soft-reflective-ceiling-policy",
        "eviction-sheddable-filter",
        "eviction-priority-then-time-ordering",
        "probabilistic-admitter",
        "agent-identity",
    ),
    "prefill/decode disaggregation": (
        "disagg-profile-handler",
        "data-parallel-profile-handler",
        "pd-profile-handler",
        "disagg-headers-handler",
        "prefill-header-handler",
        "prefix-based-pd-decider",
        "always-disagg-pd-decider",
        "always-disagg-multimodal-decider",
        "disaggregatedset-rollout-screener",
    ),
    "bursts of prompts that share a prefix": ("burst-prefix-cache-producer",),
    "Kubernetes": ("k8s-notification-source",),
    "several clusters": (
        "multicluster-session-affinity-filter",
        "multicluster-kv-cache-utilization-scorer",
        "multicluster-queue-scorer",
        "multicluster-prefix-cache-scorer",
        "multicluster-file-discovery",
        "multicluster-metrics-data-source",
        "multicluster-metrics-extractor",
    ),
    "GPU telemetry": ("dcgm-data-source", "dcgm-extractor"),
    "the Envoy picker": (
        "request-attribute-reporter",
        "vertexai-parser",
        "header-based-testing-filter",
        "destination-endpoint-served-verifier",
    ),
}

COMING: Mapping[str, str] = {name: area for area, names in _AREAS.items() for name in names}
"""Plugin type to the area it belongs to."""
