"""The data layer's types of an EndpointPickerConfig. They do nothing here: the loader checks them and hands
their settings to the parts that scrape, list models and discover endpoints.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from pointsman.registry import Plugin, register
from pointsman.scheduling.durations import seconds


@register("metrics-data-source")
class MetricsDataSource(Plugin):
    """Where and how often an endpoint's metrics page is read; without ``interval`` as the settings say."""

    scheme: Literal["http", "https"] = "http"
    path: str = "/metrics"
    insecure_skip_verify: bool = True
    ca_cert_path: str = ""
    client_cert_path: str = ""
    client_key_path: str = ""
    interval: str = ""

    def __post_init__(self) -> None:
        if self.client_cert_path or self.client_key_path:
            raise ValueError("clientCertPath, clientKeyPath: not available in this version")
        if not self.path.startswith("/"):
            raise ValueError("path: must start with a slash")
        self.interval_s = seconds(self.interval) if self.interval else None


class CustomMetric(msgspec.Struct, rename="camel", forbid_unknown_fields=True):
    """A metric published as an endpoint attribute."""

    attribute_key: str
    metric_spec: str


class EngineConfig(msgspec.Struct, rename="camel", forbid_unknown_fields=True):
    """Names of one engine's metrics, as ``name{label=value}``."""

    name: str
    queued_requests_spec: str = ""
    running_requests_spec: str = ""
    kv_usage_spec: str = ""
    lora_spec: str = ""
    cache_info_spec: str = ""
    cache_block_size_label_name: str = ""
    cache_num_blocks_label_name: str = ""
    cache_block_size_spec: str = ""
    cache_num_blocks_spec: str = ""
    custom_metrics: tuple[CustomMetric, ...] = ()


@register("core-metrics-extractor")
class CoreMetricsExtractor(Plugin):
    """Which metrics mean what: the engine is told by the label ``engineLabelKey``, else it is
    ``defaultEngine``; ``engineConfigs`` adds engines or replaces one of ours."""

    engine_label_key: str = "llm-d.ai/engine-type"
    default_engine: str = "vllm"
    engine_configs: tuple[EngineConfig, ...] = ()

    def __post_init__(self) -> None:
        names = [config.name for config in self.engine_configs]
        if len(set(names)) != len(names):
            raise ValueError("engineConfigs: two have the same name")


@register("models-data-source")
class ModelsDataSource(Plugin):
    """An endpoint's models are always read from its /v1/models, with the endpoint's own URL settings."""

    scheme: str = ""
    path: str = "/v1/models"
    insecure_skip_verify: bool | None = None

    def __post_init__(self) -> None:
        if self.path != "/v1/models":
            raise ValueError("path: only /v1/models is available in this version")
        if self.scheme or self.insecure_skip_verify is not None:
            raise ValueError("scheme, insecureSkipVerify: set them with the endpoint's URL and tls_verify")


@register("models-data-extractor")
class ModelsDataExtractor(Plugin):
    """An endpoint's models decide which requests it gets; always on."""


@register("file-discovery")
class FileDiscovery(Plugin):
    """Endpoints come from a YAML or JSON file, read again on changes with ``watchFile``."""

    path: str
    watch_file: bool = False

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("path: must not be empty")


@register("endpoint-notification-source")
class EndpointNotificationSource(Plugin):
    """Whoever wants to know when endpoints join and leave is told by the pool; always on."""


SOURCES: dict[type[Plugin], type[Plugin]] = {
    MetricsDataSource: CoreMetricsExtractor,
    ModelsDataSource: ModelsDataExtractor,
}
"""Which extractor reads which source."""
