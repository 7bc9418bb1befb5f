"""Tenants who may not share what is cached."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Annotated

from msgspec import structs

from pointsman.bench.workloads.call import Call, throughout
from pointsman.bench.workloads.families import Prompts
from pointsman.bench.workloads.family import Checked, Count, Exponent, says
from pointsman.bench.workloads.popularity import Zipf
from pointsman.bench.workloads.shared_prefix import SharedPrefix


class Tenants(Checked, frozen=True, tag_field="kind", tag="tenants"):
    """Tenants whose prompts start alike but whose ``cache_salt`` differs, so that nothing is shared between
    them. A router that overlooks the salt predicts hits that do not come.
    """

    tenants: Annotated[Count, says("each with a salt of its own")] = 10
    zipf: Annotated[Exponent, says("exponent of how busy they are; 0: all alike")] = 0.0
    of: Annotated[Prompts, says("the calls")] = SharedPrefix(groups=8)

    def calls(self, seed: int) -> Iterator[Call]:
        """The calls of ``of``, each with its tenant's salt."""
        rng, popularity = random.Random(f"tenants {seed}"), Zipf(self.tenants, self.zipf)
        for call in self.of.calls(seed):
            yield _salted(call, popularity.draw(rng), self.tenants)


def _salted(call: Call, tenant: int, tenants: int) -> Call:
    def change(call: Call) -> Call:
        group = call.group if call.group < 0 else call.group * tenants + tenant
        return structs.replace(call, cache_salt=f"tenant-{tenant}", group=group)

    return throughout(call, change)
