"""A soak: rounds of load and faults, each followed by a pause in which all must come to rest."""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import chaos, checks
from .checks import Check
from .fleet import Fleet, fleet
from .gateway import Gateway, View, gateway
from .load import Load, Tally

SETTLE_S = 8.0
"""How long what must hold may take to become true: resets have to travel, idle connections to be closed."""
RECOVER_S = 60.0
"""The same for breakers at the end: theirs open for up to 30 s (breaker.max_open_s)."""
SAMPLE_S = 1.0
LAG_S = 0.05
STARVED_S = 1.0
"""A process that was late by this much, half of the router's time-outs, makes failures the machine's."""


@dataclass(frozen=True)
class Plan:
    """What to run. A round is ``round_s`` of load; faults end ``calm_s`` before it does."""

    seconds: float = 600.0
    round_s: float = 30.0
    calm_s: float = 3.0
    warm_up_s: float = 120.0
    rate: float = 80.0
    engines: int = 8
    seed: int = 1
    settings: Sequence[str] = ()
    """Of the router, beyond ours."""


@dataclass
class Sample:
    """The state of things at a moment, seconds from the start."""

    at_s: float
    rss_bytes: int
    open_files: int
    cpu_s: dict[str, float]


@dataclass
class Pause:
    """One round's end: its row in the report, and what did not hold."""

    at_s: float
    verdicts: dict[str, int]
    rss_bytes: int
    open_files: int
    index_bytes: float
    settled_s: float
    failed: list[Check]


@dataclass
class Result:
    plan: Plan
    tally: Tally
    samples: list[Sample] = field(default_factory=list)
    pauses: list[Pause] = field(default_factory=list)
    faults: dict[str, int] = field(default_factory=dict)
    retries: int = 0
    lags_s: dict[str, float] = field(default_factory=dict)
    """How late each process' event loop was at most."""
    final: list[Check] = field(default_factory=list)

    @property
    def starved(self) -> bool:
        return max(self.lags_s.values(), default=0.0) >= STARVED_S

    @property
    def failed(self) -> list[Check]:
        return [c for p in self.pauses for c in p.failed] + [c for c in self.final if not c.ok]


class Soak:
    """One run; ``say`` gets a line after each round."""

    def __init__(
        self, plan: Plan, engines: Fleet, router: Gateway, say: Callable[[Result, Pause], None]
    ) -> None:
        self._plan = plan
        self._engines = engines
        self._router = router
        self._say = say
        self._rng = random.Random(plan.seed)
        self._load = Load(router, engines.record, random.Random(plan.seed + 1), plan.rate)
        self._start_s = time.monotonic()
        self._lag_s = 0.0
        self.result = Result(plan, self._load.tally)

    async def run(self) -> Result:
        result, plan = self.result, self._plan
        before = self._router.process.open_files()
        async with self._watching():
            try:
                while self._now_s() < plan.seconds:
                    await self._round()
                await self._recover()
            finally:
                await self._load.stop()
            view = await self._router.view()
            states = await self._engines.states()
            result.lags_s = {
                "client": self._lag_s,
                "engines": max(state["lag"]["max_s"] for state in states.values()),
            }
            result.retries = int(view.retries)
            for window in self._engines.record.windows:
                result.faults[window.kind] = result.faults.get(window.kind, 0) + 1
            await self._until(lambda: self._files(before))
            result.final = [
                *checks.answered(result.tally),
                *checks.when_quiet(view, states, result.tally),
                checks.recovered(view),
                checks.flat([(s.at_s, s.rss_bytes) for s in result.samples], plan.warm_up_s),
                await self._files(before),
                checks.no_complaints(self._router.process.complaints()),
            ]
        return result

    async def _round(self) -> None:
        plan = self._plan
        length_s = min(plan.round_s, plan.seconds - self._now_s())
        events = chaos.plan(self._rng, length_s - plan.calm_s, plan.engines)
        async with asyncio.TaskGroup() as tasks:
            playing = tasks.create_task(self._engines.play(events))
            await self._load.run_for(length_s - plan.calm_s)
            await playing
        await self._engines.heal()
        await self._load.run_for(plan.calm_s)
        await self._pause()

    async def _pause(self) -> None:
        """The load stands still: everything must come to rest."""
        began_s = self._now_s()
        await self._load.pause()
        found: list[Check] = []
        view = View()

        async def quiet() -> Check:
            nonlocal view
            view = await self._router.view()
            found[:] = checks.when_quiet(view, await self._engines.states(), self._load.tally)
            return Check("quiet", all(c.ok for c in found), "")

        await self._until(quiet)
        process, tally = self._router.process, self._load.tally
        pause = Pause(
            self._now_s(),
            {verdict.name.lower(): count for verdict, count in tally.verdicts.items()},
            process.rss_bytes(),
            process.open_files(),
            view.index_bytes,
            self._now_s() - began_s,
            [c for c in found if not c.ok],
        )
        self.result.pauses.append(pause)
        self._say(self.result, pause)

    async def _recover(self) -> None:
        """Load without faults, until every breaker has closed."""

        async def trusted() -> Check:
            await self._load.run_for(SAMPLE_S)
            return checks.recovered(await self._router.view())

        await self._until(trusted, RECOVER_S)
        await self._pause()

    async def _until(self, check: Callable[[], Awaitable[Check]], within_s: float = SETTLE_S) -> None:
        """Return when ``check`` holds, or after ``within_s``."""
        until_s = self._now_s() + within_s
        while not (await check()).ok and self._now_s() < until_s:  # noqa: ASYNC110 - other processes' state
            await asyncio.sleep(0.2)

    async def _files(self, before: int) -> Check:
        return checks.files(before, self._router.process.open_files(), self._plan.engines)

    def _now_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start_s

    @contextlib.asynccontextmanager
    async def _watching(self) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(self._sample()), asyncio.create_task(self._watch_lag())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _sample(self) -> None:
        router, engines = self._router.process, self._engines.process
        while True:
            cpu_s = {"router": router.cpu_s(), "engines": engines.cpu_s(), "client": time.process_time()}
            sample = Sample(self._now_s(), router.rss_bytes(), router.open_files(), cpu_s)
            self.result.samples.append(sample)
            await asyncio.sleep(SAMPLE_S)

    async def _watch_lag(self) -> None:
        while True:
            due_s = time.monotonic() + LAG_S
            await asyncio.sleep(LAG_S)
            self._lag_s = max(self._lag_s, time.monotonic() - due_s)


async def soak(plan: Plan, out: Path, say: Callable[[Result, Pause], None]) -> Result:
    """Run ``plan``; logs of the processes go to the folder ``out``."""
    async with fleet(plan.engines, out) as engines, gateway(engines.urls, plan.settings, out) as router:
        return await Soak(plan, engines, router, say).run()
