"""How long an engine's steps last: the plain equation, and what the engine's variants make of it."""

from __future__ import annotations

import math

from pointsman.sim.batch import DecodeBatch
from pointsman.sim.buckets import UNLIMITED, CudaGraphs, HpuBuckets
from pointsman.sim.jitter import Jitter
from pointsman.sim.profiles import EngineParameters


class Run:
    """Steps in a row with the same sequences. Without jitter each lasts ``growth_s`` longer than the one
    before it.
    """

    __slots__ = ("_first_s", "_growth_s", "_jitter", "_stall_s", "_step", "most_steps")

    def __init__(
        self,
        first_s: float,
        growth_s: float,
        most_steps: int = UNLIMITED,
        stall_s: float = 0.0,
        jitter: Jitter | None = None,
        step: int = 0,
    ) -> None:
        self._first_s = first_s
        self._growth_s = growth_s
        self._stall_s = stall_s
        self._jitter = jitter
        self._step = step
        self.most_steps = most_steps
        """What is said here holds for so many."""

    def seconds(self, steps: int) -> float:
        """Duration of the first ``steps``."""
        if self._jitter is None:
            return self._stall_s + steps * self._first_s + self._growth_s * (steps * (steps - 1) / 2)
        factors, places = self._jitter.sums(self._step, steps)
        return self._stall_s + factors * self._first_s + places * self._growth_s

    def steps_within(self, seconds: float) -> int:
        """How many are over after ``seconds``."""
        half = self._growth_s / 2
        linear = self._first_s - half
        left_s = max(0.0, seconds - self._stall_s)
        steps = int(2 * left_s / (linear + math.sqrt(linear * linear + 4 * half * left_s)))
        while self.seconds(steps + 1) <= seconds:
            steps += 1
        while steps and self.seconds(steps) > seconds:
            steps -= 1
        return steps


class StepCost:
    """The clock of one engine process; it knows which buckets have been compiled."""

    def __init__(self, parameters: EngineParameters) -> None:
        variants = parameters.variants
        self._parameters = parameters
        self._draft_share = variants.num_speculative_tokens * variants.draft_cost
        self._doubling_tokens = variants.prefill_doubling_tokens
        self._jitter = Jitter(variants.step_jitter, variants.seed) if variants.step_jitter else None
        self._buckets: CudaGraphs | HpuBuckets | None = None
        if variants.batch_buckets == "cuda-graph":
            self._buckets = CudaGraphs()
        elif variants.batch_buckets == "hpu":
            self._buckets = HpuBuckets(parameters.block_tokens, variants.recompile_s)

    def prefill(self, computed_tokens: int, tokens: int) -> float:
        """Prefill of ``tokens`` behind the first ``computed_tokens`` of a context, as the number of tokens at
        a context's beginning that take as long.
        """
        if self._doubling_tokens is None:
            return tokens
        return tokens * (1 + (computed_tokens + (tokens - 1) / 2) / self._doubling_tokens)

    def run(self, batch: DecodeBatch, prefill: float) -> Run:
        """The steps that begin now; one with ``prefill`` stays alone."""
        sequences, context, growth = batch.sequences, batch.context_tokens, batch.growth_tokens
        most, stall_s = UNLIMITED, 0.0
        if self._buckets is not None and sequences:
            padded = self._buckets.pad(sequences, context, growth, prefill > 0)
            sequences, context, growth = padded.sequences, padded.context_tokens, padded.growth_tokens
            most, stall_s = padded.steps, padded.stall_s
        plain = self._parameters
        first_s = plain.step_s(sequences, context, prefill)
        growth_s = plain.context_token_s * growth
        if self._draft_share and sequences:
            first_s += self._draft_share * plain.step_s(sequences, context)
            growth_s *= 1 + self._draft_share
        return Run(first_s, growth_s, most, stall_s, self._jitter, batch.step)
