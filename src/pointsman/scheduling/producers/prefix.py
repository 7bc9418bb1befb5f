"""approx-prefix-cache-producer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from msgspec import Meta

from pointsman.registry import Plugin, register
from pointsman.scheduling.cycle import Services
from pointsman.types import BYTES_PER_TOKEN

Count = Annotated[int, Meta(ge=0)]


@register("approx-prefix-cache-producer")
class ApproximatePrefixCache(Plugin):
    """Sizes of the prefix index: blocks of ``blockSizeTokens`` (at least 64), ``lruCapacityPerServer`` of
    them per endpoint, and how much of a prompt counts (``maxPrefixTokensToMatch``, else
    ``maxPrefixBlocksToMatch``, 0: all). With ``autoTune`` an engine's own block and cache size take the
    place of both sizes.
    """

    auto_tune: bool = True
    block_size_tokens: Count = 0
    max_prefix_tokens_to_match: Count = 131072
    max_prefix_blocks_to_match: Count = 2048
    lru_capacity_per_server: Count = 31250
    block_size: Count = 0

    outdated: ClassVar[Mapping[str, str]] = {"block_size": "characters; use blockSizeTokens"}

    def prepare(self, services: Services) -> None:
        index = services.prefix
        wanted = self.block_size_tokens or self.block_size // BYTES_PER_TOKEN
        index.set_block_tokens(wanted or index.block_tokens)
        index.auto_tune = self.auto_tune
        index.set_max_prefix_tokens(
            self.max_prefix_tokens_to_match or self.max_prefix_blocks_to_match * index.block_tokens
        )
        index.set_default_capacity((self.lru_capacity_per_server or 31250) * index.block_tokens)
