"""What is asked: sequences of calls that depend on nothing but their parameters and the seed.

A workload is an endless iterator over calls (a trace ends); the load (``bench.load``) decides when each is
due.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import msgspec

from pointsman.bench.text import text
from pointsman.errors import SettingsError


class Workload(Protocol):
    """Anything that makes calls."""

    def calls(self, seed: int) -> Iterator[Call]:
        """The calls; equal seeds give equal calls."""


class Call(msgspec.Struct, frozen=True):
    """One request to make. ``prompt_tokens`` is what the prompt's text was made for, see ``bench.text``."""

    prompt: str
    prompt_tokens: int
    output_tokens: int
    group: int = -1
    """Calls of one group share a prefix; -1 where the workload knows none."""
    at_s: float | None = None
    """Seconds after the start at which a trace has it; None where the load decides."""
    max_tokens: int | None = None
    """What a router may know of the output's length; None: the request does not tell."""
    model: str = ""
    """A LoRA adapter; empty: the base model."""
    cache_salt: str = ""
    """Prompts with unequal salts share no prefix."""
    slo_class: str = ""
    """Which of the scenario's SLO classes it belongs to."""
    headers: tuple[tuple[str, str], ...] = ()
    """Lower-cased request headers."""
    answer: str = ""
    """The text that is generated, where a later prompt goes on from it: 4 bytes an output token."""
    then: Callable[[], Sequence[tuple[float, Call]]] | None = None
    """Asked once, when this call has ended well: further calls, each with its think time [s]."""


class SharedPrefix(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Groups of prompts that share a system prompt, all prompts shuffled once and then cycled, as
    inference-perf's shared-prefix generator does: after ``groups * prompts_per_group`` calls, questions
    repeat.
    """

    groups: int = 32
    prompts_per_group: int = 5
    system_prompt_len: int = 2048
    question_len: int = 256
    output_len: int = 128

    def __post_init__(self) -> None:
        for name in ("groups", "prompts_per_group", "output_len"):
            _at_least(name, getattr(self, name), 1)
        for name in ("system_prompt_len", "question_len"):
            _at_least(name, getattr(self, name), 0)
        _at_least("system_prompt_len + question_len", self.system_prompt_len + self.question_len, 1)

    def calls(self, seed: int) -> Iterator[Call]:
        """The calls, endlessly."""
        rng = random.Random(f"shared-prefix {seed}")
        length = self.system_prompt_len + self.question_len
        distinct = []
        for group in range(self.groups):
            system = text(rng, self.system_prompt_len)
            for _ in range(self.prompts_per_group):
                prompt = system + text(rng, self.question_len)
                distinct.append(Call(prompt, length, self.output_len, group))
        rng.shuffle(distinct)
        while True:
            yield from distinct


class Unrelated(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Prompts that share nothing. Lengths are uniform within ``spread`` of their mean, 0.2 being +-20%."""

    input_len: int = 512
    output_len: int = 128
    spread: float = 0.0

    def __post_init__(self) -> None:
        _at_least("input_len", self.input_len, 1)
        _at_least("output_len", self.output_len, 1)
        if not 0 <= self.spread < 1:
            raise SettingsError("spread: must be at least 0 and below 1")

    def calls(self, seed: int) -> Iterator[Call]:
        """The calls, endlessly."""
        rng = random.Random(f"random {seed}")
        while True:
            tokens = self._length(rng, self.input_len)
            yield Call(text(rng, tokens), tokens, self._length(rng, self.output_len))

    def _length(self, rng: random.Random, mean: int) -> int:
        return max(1, round(mean * rng.uniform(1 - self.spread, 1 + self.spread)))


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise SettingsError(f"{name}: must be at least {least}")
