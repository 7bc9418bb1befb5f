"""mm-embeddings-cache-scorer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from pointsman.registry import Plugin, register
from pointsman.scheduling.cycle import Cycle
from pointsman.scheduling.signals import media_items

PRODUCER = "mm-embeddings-cache-producer"


@register("mm-embeddings-cache-scorer")
class MultimodalEmbeddingsCache(Plugin):
    """Prefer endpoints that have encoded the request's media before: matched size / total size, by tokens."""

    producer_name: str = ""

    producers: ClassVar[Mapping[str, str]] = {"producer_name": PRODUCER}
    needs: ClassVar[tuple[str, ...]] = (PRODUCER,)

    def score(self, cycle: Cycle) -> Sequence[float]:
        items = cycle.get(media_items)
        if not items:
            return [0.0] * len(cycle.endpoints)
        total, matched = sum(size for _, size in items), cycle.services.media.matched
        return [matched(e.name, items) / total for e in cycle.endpoints]
