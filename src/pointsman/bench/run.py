"""A bench run from start to report: stages one after the other, against one target."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable, Sequence
from itertools import islice, tee
from typing import Annotated

import msgspec
from msgspec import Meta

from pointsman.bench.busy import Busy
from pointsman.bench.client import Client, Record
from pointsman.bench.connection import room_for
from pointsman.bench.load import OnRecord, Send, closed_loop, open_loop
from pointsman.bench.pace import Arrivals, Pace, due_times
from pointsman.bench.report import NO_BILL, NO_SLO, Bill, Slo, Stage, summarise
from pointsman.bench.stream import Gaps
from pointsman.bench.workloads import Call, Workload

OPEN_LOOP_ROOM = 512
"""Connections an open loop must at least have room for; its need is known only afterwards."""
_PROGRESS_S = 1.0


class Load(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one stage asks for. One of ``rate`` and ``concurrency``, or neither: a trace's own times."""

    rate: Annotated[float, Meta(gt=0, le=1e6)] | None = None
    """Requests a second, open loop."""
    concurrency: Annotated[int, Meta(ge=1)] | None = None
    duration_s: Annotated[float, Meta(gt=0, le=1e9)] = 30.0
    """Engine seconds of sending; the stage then waits until all have ended."""
    requests: Annotated[int, Meta(ge=1)] | None = None
    """Stop after so many; open loop: instead of rate x duration."""
    arrivals: Arrivals = "poisson"
    """Open loop: when requests are due."""

    @property
    def name(self) -> str:
        """What the report calls it."""
        if self.rate is not None:
            return f"rate {self.rate:g}"
        return f"concurrency {self.concurrency}" if self.concurrency else "trace"


class Progress(msgspec.Struct):
    """A running stage, for whoever shows it. Counts are of this stage."""

    load: Load
    elapsed_s: float = 0.0
    sent: int = 0
    ended: int = 0
    failed: int = 0
    output_tokens: int = 0


class Result(msgspec.Struct, frozen=True):
    """All stages, and how busy this client was over them."""

    stages: tuple[Stage, ...]
    busy: Busy
    warnings: tuple[str, ...]


class Bench:
    """Runs stages and keeps their figures, also those of a stage that was interrupted."""

    def __init__(
        self,
        client: Client,
        workload: Workload,
        pace: Pace,
        *,
        seed: int = 0,
        slo: Slo = NO_SLO,
        bill: Bill = NO_BILL,
        on_progress: Callable[[Progress], None] = lambda _: None,
    ) -> None:
        self._client = client
        self._calls = workload.calls(seed)
        self._rng = random.Random(f"arrivals {seed}")
        self._pace = pace
        self._slo = slo
        self._bill = bill
        self._on_progress = on_progress
        self.stages: list[Stage] = []

    async def stage(self, load: Load) -> None:
        """Send one stage and wait until all of it has ended. The workload goes on where the last one
        stopped.
        """
        records: list[Record] = []
        progress = Progress(load)
        gaps = self._client.gaps = Gaps()
        start_s = self._pace.now()

        async def send(call: Call, due_s: float) -> Record:
            progress.sent += 1
            return await self._client.send(call, due_s)

        def on_record(record: Record) -> None:
            records.append(record)
            progress.ended += 1
            progress.failed += bool(record.error)
            progress.output_tokens += record.usage.output_tokens or record.events

        async def show() -> None:
            while True:
                await asyncio.sleep(_PROGRESS_S)
                progress.elapsed_s = self._pace.now() - start_s
                self._on_progress(progress)

        shown = asyncio.create_task(show())
        try:
            if load.concurrency:
                calls = islice(self._calls, load.requests)
                until_s = start_s + load.duration_s
                await closed_loop(send, calls, load.concurrency, until_s, self._pace, on_record)
            else:
                await self._open(load, send, on_record)
        finally:
            shown.cancel()
            await asyncio.wait([shown])
            if records:
                self.stages.append(
                    summarise(load.name, records, gaps, self._slo, bill=self._bill, rate=load.rate)
                )

    async def _open(self, load: Load, send: Send, on_record: OnRecord) -> None:
        if load.rate is None:
            calls, timed = tee(islice(self._calls, load.requests))
            due: Iterable[float] = (call.at_s or 0.0 for call in timed)
        else:
            count = load.requests or max(1, round(load.rate * load.duration_s))
            calls = self._calls
            due = due_times(load.arrivals, self._rng, load.rate, count)
        await open_loop(send, calls, due, self._pace, on_record)


def check_room(loads: Sequence[Load]) -> None:
    """Before a long run: may this process open the connections it will need?"""
    for load in loads:
        room_for(load.concurrency or OPEN_LOOP_ROOM, "--concurrency" if load.concurrency else "--rate")


def result(stages: Sequence[Stage], busy: Busy) -> Result:
    """The run with what its reader must know first."""
    warnings = busy.warnings()
    for stage in stages:
        if stage.late is not None and stage.ttft is not None and stage.late.p99 > 0.1 * stage.ttft.p50:
            warnings.append(
                f"{stage.load}: requests went out up to {stage.late.p99 * 1000:.0f} ms late (p99), more "
                "than a tenth of the TTFT: this client is part of what was measured"
            )
        if "open files" in stage.errors:
            warnings.append(f"{stage.load}: this process may not open more files; raise `ulimit -n`")
    return Result(tuple(stages), busy, tuple(warnings))
