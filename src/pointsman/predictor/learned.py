"""What a policy knows of an endpoint, as it is told."""

from __future__ import annotations

import msgspec


class Learned(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One endpoint, as things stand."""

    prefill_tok_s: float
    """Uncached prompt tokens computed in a second."""
    step_rest_s: float
    """A decode step with one sequence of little context."""
    step_s: float
    """A decode step with what it has now."""
    step_sequence_s: float
    step_context_token_s: float
    """What each sequence, and each token of context, adds to a step."""
    siblings: int
    """Endpoints that are taken to be like it."""
    factor: float
    """Its steps last so many times as long as theirs, at the same load."""
    evidence_s: float
    """Seconds of samples that it stands on, its siblings' among them, the older the less."""
    kv_room_tokens: int | None = None
    """That can still be promised; none where the engine does not publish its KV cache's size."""

    def step_at_s(self, sequences: float, context_tokens: float) -> float:
        """A decode step with so many sequences and tokens of context in all."""
        return (
            self.step_rest_s
            + self.step_sequence_s * (sequences - 1)
            + self.step_context_token_s * context_tokens
        )
