"""Runs cases, group by group, each group on a picker of its own configuration."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import grpc.aio
import msgspec

from pointsman.conformance import engine
from pointsman.conformance.case import CASES, Case
from pointsman.conformance.cases import load_cases
from pointsman.conformance.checks import Failed, Skipped
from pointsman.conformance.groups import GROUPS, write
from pointsman.conformance.relay import unverified_tls
from pointsman.conformance.start import Launch
from pointsman.conformance.subject import PATIENCE_S, Place, Subject
from pointsman.errors import SettingsError

CASE_PATIENCE_S = 60.0
UNSEEN = "the picker does not read the endpoints' metrics pages"
Verdict = Literal["pass", "fail", "skip"]
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),  # a connection of one's own to each picker
)


class Result(msgspec.Struct, frozen=True):
    """How a case went; ``reason`` is empty for one that passed."""

    case: Case
    verdict: Verdict
    reason: str = ""

    @property
    def counts(self) -> bool:
        """It makes the picker fail the suite."""
        return self.verdict == "fail" and self.case.level != "extension"


def chosen(patterns: Sequence[str]) -> list[Case]:
    """Cases by patterns (``subset-*``) of ids, or by group or level; all without any."""
    load_cases()
    if not patterns:
        return list(CASES.values())
    for pattern in patterns:
        if not any(_matches(case, pattern) for case in CASES.values()):
            raise SettingsError(f"--cases: no case, group or level is called {pattern!r}; --list shows them")
    return [case for case in CASES.values() if any(_matches(case, pattern) for pattern in patterns)]


def _matches(case: Case, pattern: str) -> bool:
    return pattern in (case.group, case.level) or fnmatchcase(case.id, pattern)


async def run(
    cases: Sequence[Case],
    launch: Launch,
    folder: Path,
    *,
    first_port: int = 0,
    patience_s: float = PATIENCE_S,
    told: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Results in the order of ``cases``; ``told`` gets each as it comes. Files go into ``folder``."""
    results: dict[str, Result] = {}

    def note(result: Result) -> None:
        results[result.case.id] = result
        told(result)

    for case in cases:
        if case.trial is None:
            note(Result(case, "skip", case.skipped))
    for name in GROUPS:
        of_group = [case for case in cases if case.group == name and case.trial is not None]
        if of_group:
            await _run_group(name, of_group, launch, folder / name, first_port, patience_s, note)
    return [results[case.id] for case in cases]


async def _run_group(
    name: str,
    cases: Sequence[Case],
    launch: Launch,
    folder: Path,
    first_port: int,
    patience_s: float,
    note: Callable[[Result], None],
) -> None:
    group = GROUPS[name]
    async with engine.running(group.engines, first_port) as engines:
        write(folder, group, engines)
        left = list(cases)
        try:
            async with (
                launch(name, group, folder) as place,
                _subject(place, engines, folder, patience_s) as subject,
            ):
                listed = group.engines if group.listed is None else group.listed
                seen = await asyncio.gather(*(engines[each].seen() for each in listed))
                while left:
                    case = left.pop(0)
                    note(await _try(case, subject) if all(seen) else Result(case, "fail", UNSEEN))
        except Failed as failed:  # it did not start
            for case in left:
                note(Result(case, "fail", str(failed)))
        except Skipped as skipped:
            for case in left:
                note(Result(case, "skip", str(skipped)))


async def _try(case: Case, subject: Subject) -> Result:
    assert case.trial is not None
    try:
        async with asyncio.timeout(CASE_PATIENCE_S):
            await case.trial(subject)
    except Failed as failed:
        return Result(case, "fail", " ".join(str(failed).split()))
    except Skipped as skipped:
        return Result(case, "skip", str(skipped))
    except TimeoutError:
        return Result(case, "fail", f"takes longer than {CASE_PATIENCE_S:g} s")
    return Result(case, "pass")


@asynccontextmanager
async def _subject(
    place: Place, engines: dict[str, engine.Engine], folder: Path, patience_s: float
) -> AsyncIterator[Subject]:
    async with AsyncExitStack() as stack:
        target = place.address
        if place.tls:
            target = await stack.enter_async_context(unverified_tls(target, folder))
        channel = await stack.enter_async_context(_channel(target))
        health = None
        if place.health_address:
            health = await stack.enter_async_context(_channel(place.health_address))
        yield Subject(channel, engines, folder, place, health, patience_s)


def _channel(target: str) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS)
