"""Prompts that share nothing."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Annotated

from msgspec import Meta

from pointsman.bench.text import text
from pointsman.bench.workloads.call import Call
from pointsman.bench.workloads.family import Count, Family, says


class Unrelated(Family, frozen=True, tag="random"):
    """Prompts that share nothing: no prefix cache helps."""

    input_len: Annotated[Count, says("mean length of a prompt")] = 512
    output_len: Annotated[Count, says("mean length of an output")] = 128
    spread: Annotated[
        float, Meta(ge=0, lt=1), says("both are uniform within this share of their mean; 0.2 is +-20%")
    ] = 0.0

    def calls(self, seed: int) -> Iterator[Call]:
        """The calls, endlessly."""
        rng = random.Random(f"random {seed}")
        while True:
            tokens = self._length(rng, self.input_len)
            prompt, output = text(rng, tokens), self._length(rng, self.output_len)
            yield Call(prompt, tokens, output, max_tokens=self.told(output))

    def _length(self, rng: random.Random, mean: int) -> int:
        return max(1, round(mean * rng.uniform(1 - self.spread, 1 + self.spread)))
