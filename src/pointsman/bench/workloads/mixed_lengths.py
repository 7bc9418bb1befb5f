"""Short and very long prompts in one stream."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Annotated

from msgspec import Meta

from pointsman.bench.text import text
from pointsman.bench.workloads.call import Call
from pointsman.bench.workloads.family import Count, Family, Share, says
from pointsman.bench.workloads.lengths import Exponential, Lengths
from pointsman.bench.workloads.passages import Shared
from pointsman.errors import SettingsError


class MixedLengths(Family, frozen=True, tag="mixed-lengths"):
    """Short prompts and, among them, some that keep an endpoint's prefill busy for seconds. Long ones may be
    questions about one of few documents.
    """

    short_len: Annotated[Count, says("length of a short prompt; they share nothing")] = 500
    long_len: Annotated[Count, says("length of a long one")] = 100_000
    long_share: Annotated[Share, says("of prompts that are long")] = 0.05
    documents: Annotated[
        int, Meta(ge=0), says("that long prompts are about, one each; 0: they share nothing")
    ] = 0
    question_len: Annotated[Count, says("what of a long prompt follows the document")] = 200
    output_len: Annotated[Count, says("mean length of an output")] = 200
    output_shape: Annotated[Lengths, says("how it varies")] = Exponential()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.documents and self.question_len >= self.long_len:
            raise SettingsError(f"question_len: must be below long_len, {self.long_len}")

    def calls(self, seed: int) -> Iterator[Call]:
        """The calls, endlessly."""
        rng = random.Random(f"mixed-lengths {seed}")
        documents = Shared(f"mixed-lengths {seed} document", self.long_len - self.question_len)
        while True:
            output = self.output_shape.draw(rng, self.output_len)
            told = self.told(output)
            if rng.random() >= self.long_share:
                yield Call(text(rng, self.short_len), self.short_len, output, max_tokens=told)
            elif self.documents:
                number = rng.randrange(self.documents)
                prompt = documents.get(number).text + text(rng, self.question_len)
                yield Call(prompt, self.long_len, output, number, max_tokens=told)
            else:
                yield Call(text(rng, self.long_len), self.long_len, output, max_tokens=told)
