"""What a policy says about metrics pages and discovery, as settings of the parts that read them."""

from __future__ import annotations

from msgspec.structs import replace

from pointsman.config import Discovery, MetricsSettings
from pointsman.endpoints.metrics.mapping import EngineMetrics, Spec
from pointsman.endpoints.metrics.source import PageSource, engines
from pointsman.errors import SettingsError
from pointsman.registry import hint
from pointsman.scheduling.datalayer import CoreMetricsExtractor, EngineConfig, MetricsDataSource
from pointsman.scheduling.picker_config import LoadedConfig

OLD_ENGINE_LABEL = "inference.networking.k8s.io/engine-type"
"""Where llm-d also looks (facts 6)."""
MIN_INTERVAL_S = 0.05
"""llm-d's least as well (facts 6)."""


def metrics_settings(policy: LoadedConfig, settings: MetricsSettings) -> MetricsSettings:
    """The settings with the policy's interval, which counts for endpoints that have requests of ours."""
    interval_s = policy.metrics_interval_s
    return settings if interval_s is None else replace(settings, interval_s=max(interval_s, MIN_INTERVAL_S))


def page_source(policy: LoadedConfig) -> PageSource | None:
    """How metrics pages are read; None when they are not."""
    if not policy.reads_metrics:
        return None
    extractor = policy.extractor or CoreMetricsExtractor()
    return _with_source(
        PageSource(
            engines=_engines(policy, extractor.default_engine),
            engine_labels=(extractor.engine_label_key, OLD_ENGINE_LABEL),
        ),
        policy.metrics,
    )


def _with_source(pages: PageSource, source: MetricsDataSource | None) -> PageSource:
    if source is None:
        return pages
    return replace(
        pages,
        path=source.path.rstrip("/"),
        tls=source.scheme == "https",
        verify=not source.insecure_skip_verify,
        tls_ca=source.ca_cert_path,
    )


def _engines(policy: LoadedConfig, default: str) -> list[EngineMetrics]:
    """Ours and the policy's, its default first: a page that fits several is the default's."""
    known = {engine.engine: engine for engine in engines()}
    for config in policy.engine_configs:
        known[config.name] = _engine(config, known.get(config.name))
    if default not in known:
        raise SettingsError(
            f"core-metrics-extractor: defaultEngine: unknown engine {default!r}{hint(default, known)}"
        )
    return [known.pop(default), *known.values()]


def _engine(config: EngineConfig, ours: EngineMetrics | None) -> EngineMetrics:
    """The policy's engine. What llm-d has no words for (hits in the engine's own prefix cache) stays ours."""
    telling = (config.running_requests_spec, config.queued_requests_spec, config.kv_usage_spec)
    recognise = next(filter(None, telling), "")
    if not recognise:
        raise SettingsError(
            f"core-metrics-extractor: engineConfigs {config.name!r}: needs runningRequestsSpec, "
            "queuedRequestsSpec or kvUsageSpec"
        )
    plain = EngineMetrics(engine=config.name, recognise="", waiting="", running="")
    base = ours or plain
    return replace(
        plain,
        recognise=Spec.parse(recognise).name.decode(),
        waiting=config.queued_requests_spec,
        running=config.running_requests_spec,
        kv_usage=config.kv_usage_spec,
        lora=config.lora_spec,
        cache_info=config.cache_info_spec,
        rank_label=base.rank_label,
        block_tokens_label=config.cache_block_size_label_name or base.block_tokens_label,
        kv_blocks_label=config.cache_num_blocks_label_name or base.kv_blocks_label,
        block_tokens=config.cache_block_size_spec,
        kv_blocks=config.cache_num_blocks_spec,
        prefix_queries=base.prefix_queries,
        prefix_hits=base.prefix_hits,
        generation_tokens=base.generation_tokens,
        preemptions=base.preemptions,
        ttft=base.ttft,
        ended=base.ended,
        attributes={metric.attribute_key: metric.metric_spec for metric in config.custom_metrics},
    )


def discovery_settings(policy: LoadedConfig, settings: Discovery) -> Discovery:
    """The settings with the policy's file of endpoints."""
    if not policy.discovery:
        return settings
    if settings.file:
        raise SettingsError(
            f"discovery.file: the picker configuration names a file of endpoints too "
            f"({policy.discovery_path}); keep one of them"
        )
    return replace(settings, file=policy.discovery_path, watch_file=policy.discovery.watch_file)
