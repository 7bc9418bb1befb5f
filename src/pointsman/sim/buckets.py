"""The sizes that engines compile or capture their decode step for: a batch runs as the next larger one."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

CUDA_GRAPH_SIZES: Sequence[int] = (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16))
"""vLLM's default capture sizes. A larger batch, and a step with prefill, runs without a graph, unpadded."""
HPU_BATCH_STEP = 32
HPU_BLOCK_STEP = 128
"""vLLM on Gaudi, linear strategy: powers of two below the step, then its multiples; KV blocks likewise."""
UNLIMITED = 1 << 40


class Padded:
    """A decode batch as it is run."""

    __slots__ = ("context_tokens", "growth_tokens", "sequences", "stall_s", "steps")

    def __init__(
        self, sequences: int, context_tokens: float, growth_tokens: float, steps: int, stall_s: float
    ) -> None:
        self.sequences = sequences
        self.context_tokens = context_tokens
        self.growth_tokens = growth_tokens
        """By so much the context grows each step."""
        self.steps = steps
        """It stays in its bucket for so many steps."""
        self.stall_s = stall_s
        """The first of them waits so long for its graph."""


class CudaGraphs:
    """Pads the batch of a step that only decodes. Graphs are captured before the first request."""

    def pad(self, sequences: int, context_tokens: float, growth_tokens: float, prefills: bool) -> Padded:
        if not prefills and sequences <= CUDA_GRAPH_SIZES[-1]:
            sequences = CUDA_GRAPH_SIZES[bisect_left(CUDA_GRAPH_SIZES, sequences)]
        return Padded(sequences, context_tokens, growth_tokens, UNLIMITED, 0.0)


class HpuBuckets:
    """Pads batch and context: on Gaudi decoding runs apart from prefill, so also in steps that have both.

    With ``recompile_s`` nothing was warmed up: a bucket met for the first time has to be compiled.
    """

    def __init__(self, block_tokens: int, recompile_s: float) -> None:
        self._block_tokens = block_tokens
        self._recompile_s = recompile_s
        self._met: set[tuple[int, int]] = set()

    def pad(self, sequences: int, context_tokens: float, growth_tokens: float, prefills: bool) -> Padded:
        batch = hpu_bucket(sequences, HPU_BATCH_STEP)
        blocks = hpu_bucket(-int(-context_tokens // self._block_tokens), HPU_BLOCK_STEP)
        tokens = blocks * self._block_tokens
        stays = 1 + int((tokens - context_tokens) // growth_tokens)
        stall_s = 0.0
        if (batch, blocks) not in self._met:
            self._met.add((batch, blocks))
            stall_s = self._recompile_s
        return Padded(batch, tokens, 0.0, stays, stall_s)


def hpu_bucket(size: int, step: int) -> int:
    """The smallest bucket that holds ``size``."""
    if size < step:
        return min(step, 1 << (size - 1).bit_length())
    return -(-size // step) * step
