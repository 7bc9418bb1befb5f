"""LoRA adapters of unequal popularity."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Annotated

from msgspec import structs

from pointsman.bench.workloads.call import Call, throughout
from pointsman.bench.workloads.families import Prompts
from pointsman.bench.workloads.family import Checked, Exponent, Share, says
from pointsman.bench.workloads.popularity import Zipf
from pointsman.bench.workloads.shared_prefix import SharedPrefix
from pointsman.errors import SettingsError


class Adapters(Checked, frozen=True, tag_field="kind", tag="lora"):
    """Calls name a LoRA adapter in ``model``, popular ones often. All calls of a conversation or a tree name
    the same. What was cached under one adapter is of no use to another.
    """

    adapters: Annotated[
        int | tuple[str, ...], says("how many (lora-0, lora-1, ...), or their names, the most popular first")
    ] = 16
    zipf: Annotated[Exponent, says("exponent of their popularity; 0: all alike")] = 1.0
    base_share: Annotated[Share, says("of calls that ask for the base model")] = 0.0
    of: Annotated[Prompts, says("the calls")] = SharedPrefix()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.names:
            raise SettingsError("adapters: must be at least 1, or a list of names")

    @property
    def names(self) -> tuple[str, ...]:
        """What calls ask for, the most popular first."""
        if isinstance(self.adapters, int):
            return tuple(f"lora-{i}" for i in range(self.adapters))
        return self.adapters

    def calls(self, seed: int) -> Iterator[Call]:
        """The calls of ``of``, each with its adapter."""
        rng, names = random.Random(f"lora {seed}"), self.names
        popularity = Zipf(len(names), self.zipf)
        for call in self.of.calls(seed):
            base = rng.random() < self.base_share
            yield _asking(call, -1 if base else popularity.draw(rng), names)


def _asking(call: Call, adapter: int, names: tuple[str, ...]) -> Call:
    def change(call: Call) -> Call:
        group = call.group if call.group < 0 else call.group * (len(names) + 1) + adapter + 1
        return structs.replace(call, model=names[adapter] if adapter >= 0 else "", group=group)

    return throughout(call, change)
