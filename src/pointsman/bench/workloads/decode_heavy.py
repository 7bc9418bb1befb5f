"""Short prompts, long outputs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Annotated

from pointsman.bench.text import text
from pointsman.bench.workloads.call import Call
from pointsman.bench.workloads.family import Count, Family, Share, says
from pointsman.bench.workloads.lengths import Exponential, Lengths, Uniform
from pointsman.errors import SettingsError


class DecodeHeavy(Family, frozen=True, tag="decode-heavy"):
    """Reasoning: short prompts that share nothing, and outputs that are mostly very long, some short. Which
    one a request will be, its prompt does not tell.
    """

    input_len: Annotated[Count, says("mean length of a prompt")] = 200
    input_shape: Annotated[Lengths, says("how it varies")] = Uniform(0.5)
    long_least: Annotated[Count, says("long outputs have from so many tokens,")] = 4000
    long_most: Annotated[Count, says("evenly, to so many")] = 8000
    short_share: Annotated[Share, says("of requests that are answered without long thought")] = 0.3
    short_len: Annotated[Count, says("mean length of those outputs")] = 300
    short_shape: Annotated[Lengths, says("how it varies")] = Exponential()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.long_most < self.long_least:
            raise SettingsError(f"long_most: must be at least long_least, {self.long_least}")

    def calls(self, seed: int) -> Iterator[Call]:
        """The calls, endlessly."""
        rng = random.Random(f"decode-heavy {seed}")
        while True:
            tokens, output = self.input_shape.draw(rng, self.input_len), self._output(rng)
            yield Call(text(rng, tokens), tokens, output, max_tokens=self.told(output))

    def _output(self, rng: random.Random) -> int:
        if rng.random() < self.short_share:
            return self.short_shape.draw(rng, self.short_len)
        return rng.randint(self.long_least, self.long_most)
