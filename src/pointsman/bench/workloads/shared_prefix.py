"""Prompts in groups that start alike."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Annotated

from pointsman.bench.text import text
from pointsman.bench.workloads.call import Call
from pointsman.bench.workloads.family import Count, Family, Tokens, says
from pointsman.errors import SettingsError


class SharedPrefix(Family, frozen=True, tag="shared-prefix"):
    """Groups of prompts that share a system prompt, all prompts shuffled once and then cycled, as
    inference-perf's shared-prefix generator does: after ``groups * prompts_per_group`` calls, questions
    repeat.
    """

    groups: Annotated[Count, says("of prompts that start alike")] = 32
    prompts_per_group: Annotated[Count, says("distinct questions of each group")] = 5
    system_prompt_len: Annotated[Tokens, says("shared by a group")] = 2048
    question_len: Annotated[Tokens, says("what follows it")] = 256
    output_len: Annotated[Count, says("generated")] = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.system_prompt_len + self.question_len:
            raise SettingsError("system_prompt_len + question_len: must be at least 1")

    def calls(self, seed: int) -> Iterator[Call]:
        """The calls, endlessly."""
        rng = random.Random(f"shared-prefix {seed}")
        length = self.system_prompt_len + self.question_len
        distinct = []
        for group in range(self.groups):
            system = text(rng, self.system_prompt_len)
            for _ in range(self.prompts_per_group):
                prompt = system + text(rng, self.question_len)
                told = self.told(self.output_len)
                distinct.append(Call(prompt, length, self.output_len, group, max_tokens=told))
        rng.shuffle(distinct)
        while True:
            yield from distinct
