"""What decisions ask of an index of blocks that engines tell of: this router's own, or that and one that is
shared.
"""

from __future__ import annotations

from typing import Protocol

from pointsman.prefix.blocks_match import BlockMatch
from pointsman.types import InferenceRequest


class BlockIndex(Protocol):
    """``precise.PreciseIndex`` or ``shared_blocks.SharedBlocks``."""

    @property
    def slots(self) -> frozenset[int]:
        """Endpoints that it may know something of: prompts for them are worth having as token ids."""
        ...

    def match(self, request: InferenceRequest, now_s: float) -> BlockMatch:
        """What each endpoint holds of the request's prompts."""
        ...

    def sent(self, slot: int, request: InferenceRequest, now_s: float, match: BlockMatch) -> None:
        """The request goes to ``slot``; ``match`` is what was found for it."""
        ...
