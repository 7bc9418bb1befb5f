"""mm-embeddings-cache-producer."""

from __future__ import annotations

import msgspec

from pointsman.registry import Plugin, register
from pointsman.scheduling.cycle import Cycle, Services
from pointsman.scheduling.media import DEFAULT_CAPACITY
from pointsman.scheduling.signals import media_items
from pointsman.types import Decision

ITEM_MB = 2
"""llm-d's assumed size of one encoded item, MiB."""


@register("mm-embeddings-cache-producer")
class MultimodalEmbeddingsProducer(Plugin):
    """Remember per endpoint the last ``cacheSizeInMBPerServer`` / 2 images, videos and audio parts sent
    there.
    """

    cache_size_in_mb_per_server: int = msgspec.field(
        default=DEFAULT_CAPACITY * ITEM_MB, name="cacheSizeInMBPerServer"
    )

    def prepare(self, services: Services) -> None:
        megabytes = self.cache_size_in_mb_per_server
        services.media.capacity = max(1, megabytes // ITEM_MB) if megabytes > 0 else DEFAULT_CAPACITY

    def on_dispatch(self, cycle: Cycle, decision: Decision) -> None:
        items = cycle.get(media_items)
        if items:
            cycle.services.media.insert(decision, items)
