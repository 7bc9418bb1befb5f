"""A simulated run as the trace that ``serve`` would have written of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import BinaryIO

import msgspec
from msgspec.structs import replace

from pointsman.observability.trace import Header, Recorder, Ruled, Speeds
from pointsman.twin.plan_fleet import KIND_LABELS
from pointsman.twin.policies import Policy
from pointsman.twin.run import Simulation
from pointsman.types import Endpoint


class TraceLog:
    """``observer`` goes to the simulation; ``begin`` before its first stage, ``end`` after the last."""

    def __init__(self, file: BinaryIO, policy: Policy) -> None:
        self._policy = policy
        self._simulation: Simulation | None = None
        self._file = file
        self.observer = Recorder(self._write, self._header, self._facts, self._clock)

    def begin(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self.observer.begin()

    def end(self) -> None:
        self.observer.fleet()

    def _write(self, line: bytes) -> None:
        self._file.write(line)

    @property
    def _of(self) -> Simulation:
        assert self._simulation is not None, "begin comes first"
        return self._simulation

    def _clock(self) -> float:
        return self._of.events.now_s

    def _header(self) -> Header:
        policy, scenario = self._policy, self._of.scenario
        return Header(
            unix_s=0.0,
            policy=Ruled(
                preset=policy.preset, parameters=policy.parameters, picker_config=policy.picker_config
            ),
            prefix_block_tokens=scenario.prefix_block_tokens,
            metrics_interval_s=scenario.metrics_interval_s,
        )

    def _facts(self) -> Sequence[tuple[Endpoint, Speeds | None]]:
        simulation = self._of
        endpoints = [
            replace(e, labels={KIND_LABELS[0]: simulation.servers[e.name].spec.accelerator} | dict(e.labels))
            for e in (member.endpoint for member in simulation.pool.members.values())
        ]
        learned = simulation.scheduler.learned(endpoints)
        return [(e, msgspec.to_builtins(learned.get(e.name))) for e in endpoints]
