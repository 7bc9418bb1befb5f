"""What a simulated engine tells of itself under ``/sim``."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from pointsman.sim.faults import Fault

LATE_SHARE = 0.1
"""A run of steps noticed later than this share of its own duration is late."""


class Lag(msgspec.Struct):
    """Wall-clock seconds between the end of a run of steps and the moment the event loop came round to it: a
    measurement in which that matters should be void.
    """

    max_s: float = 0.0
    sum_s: float = 0.0
    runs: int = 0
    """Runs waited for."""
    late_runs: int = 0

    def note(self, late_s: float, run_s: float) -> None:
        self.runs += 1
        if late_s <= 0:
            return
        self.sum_s += late_s
        if late_s > self.max_s:
            self.max_s = late_s
        if late_s > LATE_SHARE * run_s:
            self.late_runs += 1

    def clear(self) -> None:
        self.max_s = self.sum_s = 0.0
        self.runs = self.late_runs = 0


class LogRecord(msgspec.Struct, frozen=True):
    """One request that reached the engine. Seconds are the engine's."""

    id: str
    path: str
    model: str
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    arrived_s: float
    ttft_s: float | None
    duration_s: float
    ending: str
    """served, aborted (the client left) or lost (the engine crashed)."""


class Totals(msgspec.Struct):
    """Counted over the engine's whole life, crashes included."""

    served: int = 0
    aborted: int = 0
    lost: int = 0
    refused: int = 0
    """Answered with an error status."""
    restarts: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0

    def add(self, record: LogRecord) -> None:
        self.served += record.ending == "served"
        self.aborted += record.ending == "aborted"
        self.lost += record.ending == "lost"
        self.prompt_tokens += record.prompt_tokens
        self.cached_tokens += record.cached_tokens
        self.output_tokens += record.output_tokens


class EngineState(msgspec.Struct, frozen=True, kw_only=True):
    """What ``GET /sim/state`` says; the ``Totals`` among it."""

    name: str
    url: str
    accelerator: str
    models: tuple[str, ...]
    labels: Mapping[str, str]
    up: bool
    speed: float
    engine_s: float
    """The engine's clock."""
    running: int
    waiting: int
    held: int
    """Requests taken and not begun (the fault ``hang``)."""
    kv_usage: float
    kv_blocks: int
    cached_blocks: int
    connections: int
    preemptions: int
    served: int
    aborted: int
    lost: int
    refused: int
    restarts: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    log_length: int
    faults: tuple[Fault, ...]
    lag: Lag
