"""A fleet of simulated engines on one event loop."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from pointsman.errors import SettingsError
from pointsman.sim.routes import handle
from pointsman.sim.server import SimulatedEngine
from pointsman.sim.spec import EngineSpec, FleetItem, Pace, expand
from pointsman.sim.tokens import BlockHasher
from pointsman.types import Clock


@asynccontextmanager
async def running_fleet(
    specs: Sequence[EngineSpec] | int = 1,
    *,
    speed: float = 1.0,
    tokens_per_chunk: int = 1,
    host: str = "127.0.0.1",
    clock: Clock = time.monotonic,
    unix_s: Clock = time.time,
) -> AsyncIterator[list[SimulatedEngine]]:
    """Simulated engines, each behind a port of its own, until the block ends.

    ``specs`` are ``EngineSpec``, or ``FleetItem`` for several alike, or how many default engines (H100,
    granite-4.1-8b) are wanted; names are made unique. ``speed`` is engine seconds a wall-clock second. ::

        async with running_fleet(2, speed=20) as (a, b):
            a.fault("status", status=503, count=2)      # see faults.Fault
            ...                                         # requests to a.url and b.url
            await a.until(lambda state: state.aborted == 1)
            assert b.state.served == 1                  # running, waiting, served, aborted, cached_blocks ...
            assert a.log[-1].ending == "aborted"        # one record a request that reached the engine
            b.fault("crash", for_s=0.5)                 # resets connections, empties the cache
            a.clear_faults()                            # what was held back goes on

    ``SettingsError`` when a spec cannot be used or a port is taken, naming it.
    """
    if isinstance(specs, int):
        specs = [EngineSpec() for _ in range(specs)]
    items = [FleetItem(**{f: getattr(s, f) for f in s.__struct_fields__}) for s in specs]
    pace = Pace(speed=speed, tokens_per_chunk=tokens_per_chunk)
    hasher = BlockHasher()
    engines = [
        SimulatedEngine(spec, pace, handle, host=host, hasher=hasher, clock=clock, unix_s=unix_s)
        for spec in expand(items)
    ]
    by_name = {engine.name: engine for engine in engines}
    started: list[SimulatedEngine] = []
    try:
        for engine in engines:
            engine.fleet = by_name
            started.append(engine)
            try:
                await engine.start()
            except OSError as exc:
                raise SettingsError(
                    f"port: cannot listen on {host}:{engine.port}: {exc.strerror or exc}; choose another port"
                ) from exc
        yield engines
    finally:
        for engine in started:
            await engine.stop()
