"""The worlds: scenario files in folders, one for each kind of bar."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import msgspec

from pointsman.bench.workloads import SharedPrefix
from pointsman.errors import SettingsError
from pointsman.registry import hint
from pointsman.sim.spec import expand
from pointsman.twin.bound import Demand, fluid_bound
from pointsman.twin.scenario import Scenario, load_scenario

Kind = Literal["base", "changed", "equal"]
"""``base``: the case study, judged by its bound too. ``changed``: ahead of llm-d's blend is enough.
``equal``: where speed or prefixes give nothing to win, level with the best of all.
"""
KINDS: tuple[Kind, ...] = get_args(Kind)
FOLDER = Path(__file__).parent
QUICK = ("base-25", "base-85", "zipf-groups", "slow-endpoint", "equal-60", "random-equal")
"""A look at each kind."""


class World(msgspec.Struct, frozen=True, kw_only=True):
    """A scenario to hold policies against."""

    name: str
    kind: Kind
    says: str
    """The file's first line."""
    scenario: Scenario

    @property
    def rate(self) -> float:
        """Of the stage that is reported."""
        return self.scenario.stages[-1].rate or 0.0

    def bound_tok_s(self) -> float | None:
        """The fluid bound with KV; None where the world is not what it is made for: requests all alike."""
        prompts = self.scenario.workload
        if self.kind != "base" or not isinstance(prompts, SharedPrefix):
            return None
        demand = Demand(
            rate=self.rate,
            duration_s=self.scenario.stages[-1].duration_s,
            prompt_tokens=prompts.system_prompt_len + prompts.question_len,
            output_tokens=prompts.output_len,
            prefix_tokens=prompts.system_prompt_len,
            groups=prompts.groups,
        )
        pool = [(item.parameters(), len(expand([item]))) for item in self.scenario.engines]
        return fluid_bound(pool, demand, kv=True).output_tok_s


def load_worlds(names: Sequence[str] = ()) -> list[World]:
    """All worlds, or those of that name, in their order; ``SettingsError`` for a name there is none of."""
    files = {
        path.stem: path for kind in KINDS for path in sorted((FOLDER / kind).glob("*.yaml"), key=_by_rate)
    }
    for name in names:
        if name not in files:
            raise SettingsError(
                f"--worlds: {name!r} is not known{hint(name, files)}; there are {', '.join(files)}"
            )
    return [_world(files[name]) for name in names or files]


def _world(path: Path) -> World:
    first, _, _ = path.read_text(encoding="utf-8").partition("\n")
    kind = msgspec.convert(path.parent.name, Kind)
    return World(name=path.stem, kind=kind, says=first.lstrip("# "), scenario=load_scenario(path))


def _by_rate(path: Path) -> tuple[str, int]:
    """``base-100`` after ``base-85``."""
    name, _, number = path.stem.rpartition("-")
    return (name, int(number)) if number.isdigit() else (path.stem, 0)
