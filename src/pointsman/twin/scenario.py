"""What is simulated: a fleet, its load, the router's own cost, and what goes wrong when."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from pointsman.bench.report import Slo
from pointsman.bench.run import Load
from pointsman.bench.workloads import AnyWorkload, SharedPrefix, SloClasses
from pointsman.config import convert, override, read_yaml
from pointsman.errors import SettingsError
from pointsman.sim.spec import EngineSpec, FleetItem, expand
from pointsman.twin.gateway import RouterCost
from pointsman.twin.kv_events import KvEvents
from pointsman.twin.routers import Routers

Seconds = Annotated[float, Meta(ge=0)]

THREE_VENDORS = (
    FleetItem(accelerator="h100-nvl", count=4),
    FleetItem(accelerator="mi325x", count=8),
    FleetItem(accelerator="gaudi3", count=8),
)
"""The case study's pool."""
CASE_STUDY = SharedPrefix(150, 5, 6000, 1200, 1000)
"""The case study's workload."""


class Incident(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Something that happens to a server. ``slow``: steps take ``factor`` times as long. ``crash``: all it
    has is lost. ``join``: it is not there before. ``leave``: nothing new goes there.
    """

    at_s: Seconds
    """When, from the start of the first stage; warm-up and drains of earlier stages count."""
    kind: Literal["slow", "crash", "join", "leave"]
    """What happens."""
    endpoint: str
    """The engine's name; engines of an item with ``count: 8`` are ``gaudi3-0`` to ``gaudi3-7``."""
    factor: Annotated[float, Meta(gt=0)] = 2.0
    """Of ``slow``."""
    for_s: Annotated[float, Meta(gt=0)] | None = None
    """Over after so long: a crashed server comes back, a slow one recovers."""


class Scenario(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """All keys may be left out; what is left out is the case study's. Seconds are virtual."""

    engines: tuple[FleetItem, ...] = THREE_VENDORS
    """The model servers, see below."""
    workload: AnyWorkload = CASE_STUDY
    """What is sent, see [workloads](workloads.md)."""
    stages: tuple[Load, ...] = (Load(rate=30, duration_s=50), Load(rate=85, duration_s=30))
    """How much is sent when: one stage after the other has ended, caches stay as they are."""
    warm_up_stages: Annotated[int, Meta(ge=0)] = 1
    """Of the stages, the first so many are sent but not reported."""
    router: RouterCost = RouterCost()
    """What the router itself takes."""
    routers: Routers = Routers()
    """How many routers, and what they see."""
    kv_events: KvEvents | None = None
    """Servers publish KV events, and prompts come with their token ids: what is cached where is known, not
    guessed.
    """
    metrics_interval_s: Annotated[float, Meta(gt=0)] = 0.05
    """How often the router reads the metrics of an endpoint that has requests."""
    timeout_s: Annotated[float, Meta(gt=0)] = 300.0
    """After which a client gives up."""
    incidents: tuple[Incident, ...] = ()
    """What goes wrong, or changes, when."""
    slo: Slo = Slo(ttft_s=2.0, tpot_s=0.1)
    """Limits that a good request keeps."""
    classes: Mapping[str, Slo] = {}
    """SLO by class, over what a workload of SLO classes promises; other calls have ``slo``."""
    prefix_block_tokens: Annotated[int, Meta(ge=0)] = 0
    """As the setting ``prefix.block_tokens``."""

    def specs(self) -> list[EngineSpec]:
        """One spec an engine, each with its own name; ``SettingsError`` where something does not fit."""
        specs = expand(self.engines)
        names = {spec.name for spec in specs}
        for i, incident in enumerate(self.incidents):
            if incident.endpoint not in names:
                raise SettingsError(
                    f"incidents[{i}].endpoint: there is no {incident.endpoint!r}; "
                    f"there are {', '.join(sorted(names))}"
                )
        if not specs:
            raise SettingsError(
                "engines: empty; give at least one, such as {accelerator: h100-nvl, count: 4}"
            )
        if not self.stages:
            raise SettingsError("stages: empty; give at least one, such as {rate: 10, duration_s: 60}")
        if self.warm_up_stages >= len(self.stages):
            raise SettingsError(
                f"warm_up_stages: {self.warm_up_stages} of {len(self.stages)} stages leave none to report"
            )
        for i, load in enumerate(self.stages):
            if load.rate is not None and load.concurrency is not None:
                raise SettingsError(f"stages[{i}]: rate and concurrency; leave one out")
            if load.rate is None and load.concurrency is None and not self._timed():
                raise SettingsError(
                    f"stages[{i}]: give rate or concurrency; the workload has no times of its own"
                )
        return specs

    def _timed(self) -> bool:
        call = next(self.workload.calls(0), None)
        return call is not None and call.at_s is not None

    def slo_of(self, slo_class: str) -> Slo:
        """The limits for a request of that class."""
        return self.slos().get(slo_class, self.slo)

    def slos(self) -> Mapping[str, Slo]:
        """SLO by class: as the workload promises, then as ``classes`` says."""
        if not isinstance(self.workload, SloClasses):  # the only one that promises anything
            return self.classes
        promised = {part.name: Slo(part.ttft_s or None, part.tpot_s or None) for part in self.workload.used}
        return promised | dict(self.classes)


def load_scenario(path: str | os.PathLike[str] | None = None, overrides: Sequence[str] = ()) -> Scenario:
    """The scenario in a YAML file, by default the case study's, then ``a.b=c`` overrides; ``SettingsError``
    naming the key that is wrong.
    """
    tree: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(Scenario()))
    tree |= read_yaml(Path(path)) if path else {}
    if isinstance(tree["workload"], dict):
        tree["workload"].setdefault("kind", "shared-prefix")
    for text in overrides:
        if text.startswith("workload.kind="):
            tree["workload"] = {}  # another kind has other keys
        override(tree, text)
    where = os.fspath(path) if path else "scenario"
    scenario = convert(tree, Scenario, where, lists="docs/reference/scenario.md lists them")
    for spec in scenario.specs():
        spec.parameters()
    return scenario
