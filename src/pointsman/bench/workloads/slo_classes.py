"""Several kinds of traffic at once, each with what it is promised."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from itertools import accumulate
from types import MappingProxyType
from typing import Annotated, Literal, TypeAlias

from msgspec import structs

from pointsman.bench.workloads.adapters import Adapters
from pointsman.bench.workloads.agents import Agents
from pointsman.bench.workloads.call import Call, throughout
from pointsman.bench.workloads.conversations import Conversations
from pointsman.bench.workloads.families import Prompts
from pointsman.bench.workloads.family import Checked, Positive, Seconds, says
from pointsman.bench.workloads.shared_prefix import SharedPrefix
from pointsman.bench.workloads.tenants import Tenants
from pointsman.bench.workloads.unrelated import Unrelated
from pointsman.errors import SettingsError

TTFT_HEADER, TPOT_HEADER = "x-llm-d-slo-ttft-ms", "x-llm-d-slo-tpot-ms"
OBJECTIVE_HEADER = "x-llm-d-inference-objective"
"""llm-d's names: limits in milliseconds, and the InferenceObjective of the class."""
Inner: TypeAlias = Prompts | Adapters | Tenants
_NAME = re.compile(r"[!-~]+")


class Part(Checked, frozen=True, kw_only=True):
    """One class: its share of the calls and what they are promised, as llm-d's headers tell it."""

    name: Annotated[str, says("of the class, and of its InferenceObjective")]
    weight: Annotated[Positive, says("its calls are this part of all; weights need not add up to 1")] = 1.0
    ttft_s: Annotated[Seconds, says("limit for the first token; 0: none")] = 0.0
    tpot_s: Annotated[Seconds, says("limit for the mean time of each further token; 0: none")] = 0.0
    of: Annotated[Inner, says("its calls")] = SharedPrefix()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not _NAME.fullmatch(self.name):
            raise SettingsError(f"name: {self.name!r} is no header value: ASCII without spaces is")

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        """What its requests carry."""
        limits = ((TTFT_HEADER, self.ttft_s), (TPOT_HEADER, self.tpot_s))
        told = [(header, f"{limit_s * 1000:g}") for header, limit_s in limits if limit_s]
        return (*told, (OBJECTIVE_HEADER, self.name))


_INTERACTIVE = Part(name="interactive", weight=0.7, ttft_s=1.0, tpot_s=0.1, of=Conversations(think_s=5.0))
_STANDARD = Part(name="standard", weight=0.3, ttft_s=5.0, tpot_s=0.15, of=Agents())
_BATCH = Part(name="batch", weight=0.3, ttft_s=60.0, of=Unrelated(3000, 800, 0.5))
READY_MADE: Mapping[int, tuple[Part, ...]] = MappingProxyType(
    {2: (_INTERACTIVE, _BATCH), 3: (_INTERACTIVE, _STANDARD, _BATCH)}
)
"""People who wait, agents, and work that can wait: chats, trees of calls, long unrelated prompts."""


class SloClasses(Checked, frozen=True, tag_field="kind", tag="slo-classes"):
    """A mixture of classes, each with its own calls and limits. Requests carry llm-d's headers
    ``x-llm-d-slo-ttft-ms``, ``x-llm-d-slo-tpot-ms`` and ``x-llm-d-inference-objective``. The load counts
    first calls: what follows them in conversations and trees comes on top.
    """

    classes: Annotated[Literal[2, 3], says("how many ready-made ones, while `parts` is empty")] = 2
    parts: Annotated[tuple[Part, ...], says("classes of one's own")] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [part.name for part in self.used]
        if len(set(names)) < len(names):
            raise SettingsError("parts: two have the same name")

    @property
    def used(self) -> tuple[Part, ...]:
        """The classes that calls belong to."""
        return self.parts or READY_MADE[self.classes]

    def calls(self, seed: int) -> Iterator[Call]:
        """Calls of all classes, drawn by weight, until those of one end."""
        parts = self.used
        rng = random.Random(f"slo-classes {seed}")
        sources = [part.of.calls(rng.getrandbits(32)) for part in parts]
        numbers, up_to = range(len(parts)), list(accumulate(part.weight for part in parts))
        while True:
            (number,) = rng.choices(numbers, cum_weights=up_to)
            call = next(sources[number], None)
            if call is None:
                return
            yield _promised(call, parts[number], number, len(parts))


def _promised(call: Call, part: Part, number: int, parts: int) -> Call:
    def change(call: Call) -> Call:
        group = call.group if call.group < 0 else call.group * parts + number
        headers = call.headers + part.headers
        return structs.replace(call, slo_class=part.name, headers=headers, group=group, at_s=None)

    return throughout(call, change)
