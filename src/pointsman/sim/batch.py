"""The sequences that decode: how their context grows, what they have out, the KV blocks they need for it."""

from __future__ import annotations

from typing import Protocol

from pointsman.sim.sequence import EngineRequest


class DecodeBatch(Protocol):
    """Steps are counted from the engine's start, those that only prefill included."""

    step: int
    """Steps completed."""
    tokens_each: int
    """Tokens of a step's budget that a sequence takes."""
    sequences: int
    context_tokens: float
    """In the coming step, of all sequences."""

    @property
    def growth_tokens(self) -> float:
        """By so much the context grows each step."""

    @property
    def gained_tokens(self) -> int:
        """Sum of ``gained``."""

    def join(self, request: EngineRequest) -> None:
        """It decodes from the next step on. Sets its ``decode_from`` and ``finish_at``."""

    def gained(self, request: EngineRequest) -> int:
        """Tokens it got since it joined."""

    def leave(self, request: EngineRequest) -> int:
        """The blocks it held."""

    def needs_blocks(self) -> int:
        """Blocks to take before the next step."""

    def certain_steps(self, blocks: int) -> int:
        """Steps, at least, for which ``blocks`` are enough."""

    def begin(self) -> None:
        """A step is under way, its blocks are taken."""

    def advance(self, steps: int) -> int:
        """So many steps are completed, and the one behind them is under way; the blocks to take for it."""

    def complete(self) -> None:
        """The step under way is completed."""


class PlainBatch:
    """Each sequence gets one token in each step. What is asked of it costs the same for any batch."""

    tokens_each = 1

    def __init__(self, block_tokens: int) -> None:
        self.step = 0
        self.sequences = 0
        self.context_tokens: float = 0
        self._block = block_tokens
        self._begun = 0
        self._grows_at = [0] * block_tokens  # sequences by the step, modulo block, that needs a block
        self._joined = 0  # sum of ``decode_from``

    @property
    def growth_tokens(self) -> float:
        return self.sequences

    @property
    def gained_tokens(self) -> int:
        return self.sequences * self.step - self._joined

    def join(self, request: EngineRequest) -> None:
        request.decode_from = self.step
        request.finish_at = self.step + request.output_tokens - request.generated
        self.sequences += 1
        self.context_tokens += request.prefill_tokens + 1
        self._joined += self.step
        self._grows_at[(self.step - request.prefill_tokens) % self._block] += 1

    def gained(self, request: EngineRequest) -> int:
        return self.step - request.decode_from

    def leave(self, request: EngineRequest) -> int:
        began = request.decode_from - request.prefill_tokens
        self.sequences -= 1
        self.context_tokens -= self.step - began + 1
        self._joined -= request.decode_from
        self._grows_at[began % self._block] -= 1
        return -(-(self._begun - began) // self._block)

    def needs_blocks(self) -> int:
        return self._grows_at[self.step % self._block]

    def certain_steps(self, blocks: int) -> int:
        return blocks // self.sequences * self._block

    def begin(self) -> None:
        self._begun += 1

    def advance(self, steps: int) -> int:
        rounds, rest = divmod(steps, self._block)
        blocks = rounds * self.sequences
        for step in range(self._begun, self._begun + rest):
            blocks += self._grows_at[step % self._block]
        self.step += steps
        self._begun += steps
        self.context_tokens += steps * self.sequences
        return blocks

    def complete(self) -> None:
        self.step += 1
        self.context_tokens += self.sequences
