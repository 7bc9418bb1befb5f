"""Prompts in groups that start alike."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import count
from typing import Annotated

from msgspec import Meta

from pointsman.bench.text import text
from pointsman.bench.workloads.call import Call
from pointsman.bench.workloads.family import Count, Exponent, Family, Tokens, says
from pointsman.bench.workloads.lengths import Fixed, Lengths
from pointsman.bench.workloads.passages import Shared
from pointsman.bench.workloads.popularity import Zipf
from pointsman.errors import SettingsError


class SharedPrefix(Family, frozen=True, tag="shared-prefix"):
    """Groups of prompts that share a system prompt, all prompts shuffled once and then cycled, as
    inference-perf's shared-prefix generator does: after ``groups * prompts_per_group`` calls, questions
    repeat. With ``zipf`` above 0, prompts are drawn instead, some groups more often than others.
    """

    groups: Annotated[Count, says("of prompts that start alike")] = 32
    prompts_per_group: Annotated[Count, says("distinct questions of each group")] = 5
    system_prompt_len: Annotated[Tokens, says("shared by a group")] = 2048
    question_len: Annotated[Tokens, says("what follows it")] = 256
    output_len: Annotated[Count, says("mean length of an output")] = 128
    output_shape: Annotated[Lengths, says("how it varies; a prompt that repeats has its own again")] = Fixed()
    zipf: Annotated[Exponent, says("exponent of the groups' popularity; 0: the cycle, all alike")] = 0.0
    hot_for_calls: Annotated[
        int, Meta(ge=0), says("after each so many calls, other groups become the popular ones; 0: never")
    ] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.system_prompt_len + self.question_len:
            raise SettingsError("system_prompt_len + question_len: must be at least 1")
        if self.hot_for_calls and not self.zipf:
            raise SettingsError("hot_for_calls: no group is more popular than others while zipf is 0")

    def calls(self, seed: int) -> Iterator[Call]:
        """The calls, endlessly."""
        return self._drawn(seed) if self.zipf else self._cycled(seed)

    def _cycled(self, seed: int) -> Iterator[Call]:
        rng, outputs = random.Random(f"shared-prefix {seed}"), random.Random(f"shared-prefix outputs {seed}")
        distinct: list[Call] = []
        for group in range(self.groups):
            system = text(rng, self.system_prompt_len)
            distinct += [
                self._call(group, system + text(rng, self.question_len), outputs)
                for _ in range(self.prompts_per_group)
            ]
        rng.shuffle(distinct)
        while True:
            yield from distinct

    def _drawn(self, seed: int) -> Iterator[Call]:
        name = f"shared-prefix zipf {seed}"
        rng, popularity = random.Random(name), Zipf(self.groups, self.zipf)
        systems = Shared(f"{name} system", self.system_prompt_len)
        by_popularity = list(range(self.groups))
        for number in count():
            if number == 0 or (self.hot_for_calls and number % self.hot_for_calls == 0):
                rng.shuffle(by_popularity)
            group = by_popularity[popularity.draw(rng)]
            own = random.Random(f"{name} {group} {rng.randrange(self.prompts_per_group)}")
            yield self._call(group, systems.get(group).text + text(own, self.question_len), own)

    def _call(self, group: int, prompt: str, rng: random.Random) -> Call:
        output = self.output_shape.draw(rng, self.output_len)
        length = self.system_prompt_len + self.question_len
        return Call(prompt, length, output, group, max_tokens=self.told(output))
