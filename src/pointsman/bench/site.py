"""A simulated fleet with the router in front of it, each a process of ours, and how late each of them ran."""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import yaml
from msgspec import structs

from pointsman.bench.busy import Watch
from pointsman.bench.probe import Probe, mean_wait_s
from pointsman.bench.processes import Process, running
from pointsman.config import Endpoint, Settings
from pointsman.sim.spec import FleetFile, expand
from pointsman.types import Clock

_READY_S = 30.0


class Site(msgspec.Struct, frozen=True):
    """A fleet with a router in front of it, both running."""

    fleet: Process
    router: Process
    url: str
    admin_url: str
    engines: dict[str, str]
    """URL of each engine by its name, which is also the endpoint's at the router."""


@contextlib.asynccontextmanager
async def site(
    fleet: FleetFile, settings: Settings, folder: Path, command: str = "serve"
) -> AsyncIterator[Site]:
    """Both processes for as long as the block lasts; ``folder`` is for their files. Endpoints and ports of
    the router's ``settings`` are set here, and its clock runs as fast as the engines. ``command`` is what
    of ours routes; all but `serve` have no other clock than ours.
    """
    pace = ("--clock-speed", f"{fleet.speed:g}") if command == "serve" else ()
    assert pace or fleet.speed == 1, f"`pointsman {command}` cannot be sped up"
    async with contextlib.AsyncExitStack() as stack:
        file = _written(fleet, folder / "fleet.yaml")
        engines = await stack.enter_async_context(running("fleet", ("engine", "--fleet", file)))
        urls = {spec.name: await _url(engines, spec.name) for spec in expand(fleet.engines)}
        told = structs.replace(
            settings,
            endpoints=tuple(Endpoint(url=url, name=name) for name, url in urls.items()),
            server=structs.replace(settings.server, host="127.0.0.1", port=0),
            admin=structs.replace(settings.admin, port=0),
            envoy=structs.replace(settings.envoy, admin_port=0),
        )
        file = _written(told, folder / "router.yaml")
        router = await stack.enter_async_context(running("router", (command, "--config", file, *pace)))
        url = (await router.says(r"^base URL: (\S+)/v1$", _READY_S))[1]
        admin_url = (await router.says(r"^admin:\s+(http://[^/\s]+)", _READY_S))[1]
        yield Site(engines, router, url, admin_url, urls)


async def _url(engines: Process, name: str) -> str:
    """Where the engine is, once the fleet has said so."""
    return (await engines.says(rf"^\s*{re.escape(name)}\s+(http://[\w.:]+)", _READY_S))[1]


def _written(content: msgspec.Struct, path: Path) -> str:
    path.write_text(yaml.safe_dump(msgspec.to_builtins(content)))
    return str(path)


class Lag(msgspec.Struct, frozen=True):
    """How late a process' event loop ran [our seconds], and its share of one core."""

    mean_s: float
    """For whoever comes at any moment."""
    cpu_share: float
    max_s: float = 0.0


@contextlib.asynccontextmanager
async def watching(at: Site, clocks: tuple[Clock, Clock]) -> AsyncIterator[dict[str, Lag]]:
    """Each process' lag over the block, by name: there once it has ended. ``clocks``: seconds, and CPU
    seconds of this process, the load generator.
    """
    clock, cpu_clock = clocks
    lags: dict[str, Lag] = {}
    others = {"fleet": at.fleet, "router": at.router}
    start_s, before = clock(), {name: process.cpu_s() for name, process in others.items()}
    async with (
        Watch(clock, cpu_clock) as watch,
        Probe(next(iter(at.engines.values())), "/health", clock) as fleet_probe,
        Probe(at.admin_url, "/healthz", clock) as router_probe,
    ):
        yield lags
        busy = watch.busy()
    took_s = clock() - start_s
    waits_s = {"fleet": fleet_probe.waits_s(), "router": router_probe.waits_s()}
    for name, process in others.items():
        cpu_share = (process.cpu_s() - before[name]) / took_s
        lags[name] = Lag(mean_wait_s(waits_s[name]), cpu_share, max(waits_s[name], default=0.0))
    ours_s = min(lags[name].mean_s for name in others)  # our own is in both
    lags["load generator"] = Lag(ours_s, busy.cpu_share, busy.lag_max_s)
