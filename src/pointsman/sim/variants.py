"""What real engines do that the plain step-time equation leaves out, each off by default.

A policy that shares the simulator's equation would win by that alone; these make the equation wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta, structs

Positive: TypeAlias = Annotated[float, Meta(gt=0)]
Share: TypeAlias = Annotated[float, Meta(ge=0, le=1)]


class Variants(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """How an engine differs from the plain equation."""

    batch_buckets: Literal["none", "cuda-graph", "hpu"] = "none"
    """Sizes a decode batch is padded to: those vLLM captures CUDA graphs for, or those of vLLM on Gaudi,
    where the context is padded too.
    """
    recompile_s: Annotated[float, Meta(ge=0)] = 0.0
    """How long a step waits for its graph to be compiled when a bucket is met for the first time."""
    num_speculative_tokens: Annotated[int, Meta(ge=0, le=32)] = 0
    """Tokens drafted in each step for each decoding sequence; 0: no speculative decoding."""
    draft_acceptance: tuple[Positive, Positive] = (7.0, 3.0)
    """Parameters of the Beta distribution from which each request's acceptance rate is drawn."""
    draft_cost: Share = 0.03
    """Share of a decode step that drafting and verifying one more token adds to it."""
    prefill_doubling_tokens: Annotated[int, Meta(ge=1)] | None = None
    """Place in the context at which computing a prompt token takes twice what the first one takes; None:
    all take the same."""
    step_jitter: Share = 0.0
    """Standard deviation of a step's duration, as a share of it."""
    seed: Annotated[int, Meta(ge=0)] = 0
    """Of what is random."""

    @property
    def random(self) -> bool:
        """Whether ``seed`` matters."""
        return self.step_jitter > 0 or self.num_speculative_tokens > 0

    def said(self) -> Mapping[str, object]:
        """What differs from the plain equation, by field."""
        return {
            field: value for field, value in structs.asdict(self).items() if value != getattr(PLAIN, field)
        }


PLAIN = Variants()
