"""How fast an engine is: the parameter sets that engines are simulated with, and the step time they give.

The five sets were fitted on the single-vendor runs of the public benchmark
praveingk/llmd-benchmarking-nxtgen (one vLLM a card, tensor parallelism 1); KV size, prefill speed and the
cost of a step with prefill trade off in the fit, so none of the three is a measurement of its own.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from pointsman.sim.variants import Variants

GRANITE = "granite-4.1-8b"
SARVAM = "sarvam-30b"


class EngineParameters(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One engine's speed and limits. A step lasts ``base_s`` + ``sequence_s`` for each decoding sequence +
    ``context_token_s`` for each token of their context + the prefill tokens at ``prefill_tokens_per_s`` +
    ``prefill_step_s`` when it prefills at all.
    """

    base_s: float
    sequence_s: float
    context_token_s: float
    prefill_tokens_per_s: float
    prefill_step_s: float
    kv_tokens: int
    max_sequences: int
    block_tokens: int
    step_tokens: int = 8192
    """Token budget of a step: one for each decoding sequence, the rest for prefill."""
    prefix_caching: bool = True
    cpu_kv_tokens: int = 0
    """KV tokens that fit into the CPU's memory, where blocks go that are evicted."""
    variants: Variants = Variants()
    """How its steps differ from that equation."""

    @property
    def kv_blocks(self) -> int:
        return self.kv_tokens // self.block_tokens

    @property
    def cpu_blocks(self) -> int:
        return self.cpu_kv_tokens // self.block_tokens

    def step_s(self, decoding: int, context_tokens: float, prefill_tokens: float = 0) -> float:
        """Duration of one step."""
        seconds = self.base_s + self.sequence_s * decoding + self.context_token_s * context_tokens
        if prefill_tokens:
            seconds += prefill_tokens / self.prefill_tokens_per_s + self.prefill_step_s
        return seconds


def _fitted(
    a_ms: float, b_us: float, c_ns: float, prefill: float, d_ms: float, kv: int, sequences: int, block: int
) -> EngineParameters:
    return EngineParameters(
        base_s=a_ms * 1e-3,
        sequence_s=b_us * 1e-6,
        context_token_s=c_ns * 1e-9,
        prefill_tokens_per_s=prefill,
        prefill_step_s=d_ms * 1e-3,
        kv_tokens=kv,
        max_sequences=sequences,
        block_tokens=block,
        step_tokens=16384 if block == 128 else 8192,
    )


PARAMETERS: Mapping[tuple[str, str], EngineParameters] = {
    ("h100-nvl", GRANITE): _fitted(7.83, 17.0, 74.8, 17_212, 4.8, 363_000, 1024, 16),
    ("mi325x", GRANITE): _fitted(6.13, 19.6, 50.1, 8_546, 4.6, 1_000_000, 1024, 16),
    ("gaudi3", GRANITE): _fitted(9.80, 84.0, 168.1, 18_898, 53.8, 477_000, 256, 128),
    ("h100-nvl", SARVAM): _fitted(11.05, 36.6, 13.3, 41_200, 2.3, 799_000, 1024, 16),
    ("mi325x", SARVAM): _fitted(6.85, 109.8, 9.4, 21_984, 3.0, 9_200_000, 1024, 16),
}
"""By accelerator and model."""

ACCELERATORS = tuple(dict.fromkeys(accelerator for accelerator, _ in PARAMETERS))
MODELS = tuple(dict.fromkeys(model for _, model in PARAMETERS))
