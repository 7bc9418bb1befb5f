"""What a workload is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import msgspec
from msgspec import structs


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


def throughout(call: Call, change: Callable[[Call], Call]) -> Call:
    """The call changed, and in the same way all that follow it."""
    changed, then = change(call), call.then
    if then is None:
        return changed
    return structs.replace(
        changed, then=lambda: [(think_s, throughout(next_call, change)) for think_s, next_call in then()]
    )
