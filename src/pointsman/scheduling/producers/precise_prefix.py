"""precise-prefix-cache-producer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import msgspec

from pointsman.registry import Plugin, register
from pointsman.scheduling.durations import seconds
from pointsman.scheduling.producers.precise_prefix_config import Indexer, KvEvents, TokenProcessor

EVERY_ENDPOINT = "events of all endpoints of the pool are followed"
TOKENS = "engines are asked for token ids, or tokens.models names folders"
OWN_SIZE = "the index is bounded in bytes: kv_events.index_bytes, or costAwareMemoryConfig.size"


@register("precise-prefix-cache-producer")
class PrecisePrefixCache(Plugin):
    """What an endpoint holds of a prompt is what its engine tells in KV events. The parameters take the place
    of the settings kv_events, shared_index and tokens; docs/howto/precise-prefix.md has the table.
    """

    token_processor_config: TokenProcessor = msgspec.field(default_factory=TokenProcessor)
    indexer_config: Indexer = msgspec.field(default_factory=Indexer)
    kv_events_config: KvEvents = msgspec.field(default_factory=KvEvents)
    speculative_indexing: bool | None = None
    speculative_ttl: str = msgspec.field(default="", name="speculativeTTL")

    unused: ClassVar[Mapping[str, str]] = {
        "kvEventsConfig.concurrency": "one thread reads all events",
        "kvEventsConfig.podDiscoveryConfig.podLabelSelector": EVERY_ENDPOINT,
        "kvEventsConfig.podDiscoveryConfig.podNamespace": EVERY_ENDPOINT,
        "indexerConfig.kvBlockIndexConfig.inMemoryConfig.size": OWN_SIZE,
        "indexerConfig.kvBlockIndexConfig.inMemoryConfig.podCacheSize": "every holder of a block is known",
        "indexerConfig.kvBlockIndexConfig.metricsLoggingInterval": "metrics are on the admin port",
        "indexerConfig.kvBlockIndexConfig.maxPrefixTokensToMatch": "llm-d does not read it either",
        "indexerConfig.kvBlockIndexConfig.redisConfig.enableRDMA": "the connection is TCP",
        "indexerConfig.kvBlockIndexConfig.valkeyConfig.enableRDMA": "the connection is TCP",
        "indexerConfig.tokenProcessorConfig": "its place is tokenProcessorConfig, beside indexerConfig",
        "indexerConfig.prefixStoreConfig": "tokens.cache_bytes says how much is remembered",
        "indexerConfig.tokenizersPoolConfig": TOKENS,
    }

    def __post_init__(self) -> None:
        self._ttl_s = seconds(self.speculative_ttl) if self.speculative_ttl else None

    @property
    def expected_s(self) -> float | None:
        """How long what was just sent counts, seconds; 0.0: not at all, None: as always."""
        return 0.0 if self.speculative_indexing is False else self._ttl_s or None

    @property
    def tier_weights(self) -> Mapping[str, float] | None:
        """What a block is worth by where it is; None: as always."""
        backends = self.indexer_config.kv_cache_backend_configs
        return None if backends is None else {b.name.lower(): b.weight for b in backends}
