"""Endpoints that come, go, and do not tell."""

from __future__ import annotations

import asyncio

from pointsman.conformance.case import LLMD, LLMD_TESTS, case
from pointsman.conformance.checks import check, equal, fail
from pointsman.conformance.engine import Load
from pointsman.conformance.exchange import Answer
from pointsman.conformance.groups import write_endpoints
from pointsman.conformance.subject import Subject

LOOKS_EVERY_S = 0.1


async def _until_chosen(subject: Subject, names: set[str]) -> None:
    """Requests go to each of ``names``, and to nobody else, soon."""
    choices = set[str]()
    try:
        async with asyncio.timeout(subject.patience_s):
            while choices != names:
                choices = {subject.chosen(await subject.ask()) for _ in range(8)}
                await asyncio.sleep(LOOKS_EVERY_S)  # nothing tells when the picker has read its file
    except TimeoutError:
        fail(f"requests go to {sorted(choices)}, though the file lists {sorted(names)}")


@case(
    "endpoints-followed",
    "With watchFile the endpoints are those that the file lists now.",
    LLMD,
    group="watched",
)
async def endpoints_followed(subject: Subject) -> None:
    engines = subject.engines
    for names in ("a", "b", "ab", "a"):
        write_endpoints(subject.folder, [engines[name] for name in names])
        await _until_chosen(subject, set(names))


@case(
    "no-metrics",
    "Endpoints whose metrics page fails are routed to all the same.",
    LLMD_TESTS,
    group="watched",
)
async def no_metrics(subject: Subject) -> None:
    await subject.show(a=Load(failing=True))
    answers: list[Answer] = [await subject.ask() for _ in range(3)]
    equal("the choices", {subject.chosen(answer) for answer in answers}, {"a"})
    check(subject.engines["a"].load.failing, "the page is back")
