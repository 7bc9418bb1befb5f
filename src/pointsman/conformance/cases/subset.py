"""Subset hints: the gateway names the endpoints that may be chosen."""

from __future__ import annotations

from pointsman.conformance.case import LLMD, LLMD_TESTS, PROTOCOL, case
from pointsman.conformance.checks import equal
from pointsman.conformance.engine import Load
from pointsman.conformance.exchange import Answer
from pointsman.conformance.subject import Subject

REASON = "x-llm-d-request-dropped-reason"
LOADS = {"a": Load(0, 0.1), "b": Load(3, 0.4), "c": Load(9, 0.9)}
"""Best first."""


async def _choice(subject: Subject, subset: object) -> str:
    await subject.show(**LOADS)
    return subject.chosen(await subject.ask(subset=subset))


def _none_left(answer: Answer) -> None:
    refused = answer.refusal(503)
    equal(REASON, (refused.header(REASON) or b"").decode(), "rejected-no-endpoints")


@case("subset-best", "Of the endpoints in the subset the best is chosen.", LLMD_TESTS, level="protocol")
async def subset_best(subject: Subject) -> None:
    equal("the choice", await _choice(subject, [subject.address("c"), subject.address("b")]), "b")


@case(
    "subset-of-one",
    "The only endpoint of the subset is chosen, whatever its load and whoever else is listed.",
    LLMD_TESTS,
    level="protocol",
)
async def subset_of_one(subject: Subject) -> None:
    equal("the choice", await _choice(subject, [subject.address("c"), "10.9.8.7:8000"]), "c")


@case(
    "subset-without-match",
    "A subset of strangers is refused with 503, the reason being rejected-no-endpoints.",
    LLMD_TESTS,
    level="protocol",
)
async def subset_without_match(subject: Subject) -> None:
    _none_left(await subject.ask(subset=["10.9.8.7:8000"]))


@case(
    "subset-empty",
    "An empty subset is refused with 503, the reason being rejected-no-endpoints.",
    f"{PROTOCOL}; {LLMD}",
    level="protocol",
)
async def subset_empty(subject: Subject) -> None:
    _none_left(await subject.ask(subset=[]))


@case("subset-ports", "Members of a subset are matched by address, whatever the port.", LLMD)
async def subset_ports(subject: Subject) -> None:
    host = subject.engines["c"].host
    equal("the choice", await _choice(subject, [f"{host}:1"]), "c")


@case("subset-no-list", "A hint that is no list is not looked at: any endpoint may be chosen.", LLMD)
async def subset_no_list(subject: Subject) -> None:
    equal("the choice", await _choice(subject, subject.address("c")), "a")


@case("subset-odd-members", "Members of a subset that are no strings are passed over.", LLMD)
async def subset_odd_members(subject: Subject) -> None:
    equal("the choice", await _choice(subject, [7, subject.address("c"), None]), "c")
    _none_left(await subject.ask(subset=[7, True]))


@case(
    "subset-switched-off",
    "With --disable-endpoint-subset-filter hints are not looked at.",
    LLMD,
    group="whole-pool",
)
async def subset_switched_off(subject: Subject) -> None:
    equal("the choice", await _choice(subject, [subject.address("c")]), "a")
    equal("the choice", await _choice(subject, []), "a")
