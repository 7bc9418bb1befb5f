"""A request as the engine model has it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Protocol

from pointsman.sim.drafts import Draft
from pointsman.sim.kv_cache import Segment


class Phase(Enum):
    """Where a sequence is in its life."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    DONE = "done"


class Content(Protocol):
    """What a sequence's blocks consist of."""

    lora: str
    """Name of its adapter; empty for the base model."""
    salt: str
    """Only equal salts share blocks."""

    def token_ids(self, first: int, blocks: int) -> bytes:
        """Of so many blocks from block ``first`` on, prompt and answer in a row: four bytes a token,
        little-endian.
        """
        ...


class EngineRequest:
    """One sequence: a prompt as block hashes and a token count, and how many tokens it will answer with.

    Submit it once. Its fields belong to the engine; others only read them.
    """

    __slots__ = (
        "arrived_s",
        "blocks",
        "cached_tokens",
        "computed_tokens",
        "content",
        "continuation",
        "decode_from",
        "draft",
        "ended_s",
        "finish_at",
        "first_token_s",
        "generated",
        "last",
        "output_tokens",
        "owner",
        "phase",
        "preemptions",
        "prefill_tokens",
        "prompt_tokens",
        "published",
        "scheduled_s",
        "shared",
    )

    def __init__(
        self,
        blocks: Sequence[int],
        prompt_tokens: int,
        output_tokens: int,
        *,
        owner: object = None,
        continuation: Callable[[int], Sequence[int]] | None = None,
        content: Content | None = None,
    ) -> None:
        """``blocks``: chained hashes of the prompt's full blocks, none where it cannot be cached.
        ``continuation``: hashes of the full blocks behind these when so many tokens are in the KV cache, if
        the output is to be found again. ``output_tokens`` 0 is a prefill alone (an embedding). ``content``
        is for engines that keep a journal.
        """
        assert prompt_tokens > 0
        assert output_tokens >= 0
        self.blocks = blocks
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.owner = owner
        self.phase = Phase.WAITING
        self.cached_tokens = 0
        """Prompt tokens found in the cache when it was first scheduled."""
        self.preemptions = 0
        self.arrived_s = self.scheduled_s = self.first_token_s = self.ended_s = math.nan
        self.continuation = continuation
        self.content = content
        self.generated = 0
        """Tokens out when decoding began (or stopped); ``Engine.generated`` knows those since."""
        self.decode_from = 0
        """The engine's step count at that moment."""
        self.finish_at = -1
        """Step count at which the last token is out."""
        self.prefill_tokens = 0
        """To have in the KV cache before it decodes."""
        self.computed_tokens = 0
        self.last: Segment | None = None
        self.shared = 0
        """Blocks held through ``last``."""
        self.published = True
        self.draft: Draft | None = None
        """Its luck with speculative decoding, once it has decoded."""
