"""Requests under way count, and what has ended counts no more, however it ended."""

from __future__ import annotations

import time

from pointsman.conformance import wire
from pointsman.conformance.case import LLMD, LLMD_TESTS, case
from pointsman.conformance.checks import equal, fail
from pointsman.conformance.subject import OK, SSE, Subject, completion, post

IN_A_ROW = 12
"""Of two endpoints that look alike a picker may choose either: this often the same is no chance."""
CUTS = 3


async def _whole(subject: Subject) -> str:
    """Name of the endpoint that gets a request, which then ends in good order."""
    body = completion()
    async with subject.exchange() as stream:
        name = subject.chosen(await stream.request(post(body), [body]))
        await stream.response_headers(OK)
        await stream.response_body(b"{}")
        await stream.half_close()
        await stream.ended()
    return name


async def _busy_is_avoided(subject: Subject, busy: str, wrong: str) -> None:
    """While ``busy`` has one request under way every other one goes elsewhere; not at first, perhaps, as
    news of a cut stream takes its way.
    """
    body = completion()
    async with subject.exchange(subset=[subject.address(busy)]) as stream:
        equal("the choice in a subset of one", subject.chosen(await stream.request(post(body), [body])), busy)
        deadline = time.monotonic() + subject.patience_s
        while busy in [await _whole(subject) for _ in range(IN_A_ROW)]:
            if time.monotonic() > deadline:
                fail(wrong)


async def _nothing_left(subject: Subject, name: str) -> None:
    """The endpoint's count is zero: not more, not less."""
    other = "b" if name == "a" else "a"
    await _busy_is_avoided(subject, other, f"{name} is still held to be busy")
    await _busy_is_avoided(subject, name, f"{name} is held to have less than nothing under way")


@case(
    "under-way-counts",
    "A request under way counts: others go to the endpoint that has none.",
    LLMD,
    group="in-flight",
)
async def under_way_counts(subject: Subject) -> None:
    for busy in ("a", "b"):
        await _busy_is_avoided(
            subject, busy, f"requests go to {busy}, which is busy, and not to the idle one"
        )


@case(
    "ended-counts-no-more",
    "A response that has ended counts no more, though its stream is still open.",
    LLMD,
    group="in-flight",
)
async def ended_counts_no_more(subject: Subject) -> None:
    body = completion()
    async with subject.exchange(subset=[subject.address("a")]) as stream:
        await stream.request(post(body), [body])
        await stream.response_headers(OK)
        await stream.response_body(b"{}")
        await _nothing_left(subject, "a")
    await _nothing_left(subject, "a")


@case(
    "cut-before-the-end",
    "A stream that is reset before the request is whole counts for nothing.",
    LLMD_TESTS,
    group="in-flight",
)
async def cut_before_the_end(subject: Subject) -> None:
    body = completion()
    for _ in range(CUTS):
        async with subject.exchange(subset=[subject.address("a")]) as stream:
            await stream.send(wire.headers("request", post(body), end=False))
            await stream.send(wire.body("request", body[:5], end=False))
    await _nothing_left(subject, "a")


@case(
    "cut-after-scheduling",
    "A stream that is reset after the endpoint was chosen counts no more.",
    LLMD_TESTS,
    group="in-flight",
)
async def cut_after_scheduling(subject: Subject) -> None:
    body = completion()
    for _ in range(CUTS):
        async with subject.exchange(subset=[subject.address("a")]) as stream:
            await stream.request(post(body), [body])
    await _nothing_left(subject, "a")


@case(
    "cut-in-the-response",
    "A stream that is reset in the middle of the response counts no more.",
    LLMD_TESTS,
    group="in-flight",
)
async def cut_in_the_response(subject: Subject) -> None:
    body = completion(stream=True)
    for _ in range(CUTS):
        async with subject.exchange(subset=[subject.address("a")]) as stream:
            await stream.request(post(body), [body])
            await stream.response_headers(SSE)
            await stream.send(wire.body("response", b"data: {}\n\n", end=False))
            await stream.expect("response_body")
    await _nothing_left(subject, "a")
