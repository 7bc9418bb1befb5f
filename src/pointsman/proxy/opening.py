"""Has a request decided on: at once, or as soon as its prompts' token ids and blocks are known.

A front hands in a parsed request and is told what became of it, perhaps before the call returns.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from msgspec.structs import replace

from pointsman.errors import PointsmanError
from pointsman.prefix.block_index import BlockIndex
from pointsman.prefix.shared_blocks import SharedBlocks
from pointsman.router import Eligible, Flight, Router
from pointsman.tokens.found import Found
from pointsman.tokens.tokens import Tokens
from pointsman.types import Endpoint, InferenceRequest

log = logging.getLogger(__name__)

Told = Callable[[Flight | PointsmanError], None]
"""Told of a flight, which is then the front's to close, or of what the client is to be told."""


class Opening(Protocol):
    """Where fronts get decisions."""

    def open(self, request: InferenceRequest, told: Told, eligible: Eligible | None = None) -> None:
        """Have it decided on, among the ``eligible``. Tells exactly once."""

    def reopen(self, flight: Flight, told: Callable[[bool], None]) -> None:
        """After a failure: tells whether there is another endpoint that it goes to now."""


class _Asked:
    """A request on its way to its decision; ``request`` grows by what is found out for it."""

    __slots__ = ("eligible", "endpoints", "request", "told", "until_s")

    def __init__(self, request: InferenceRequest, told: Told, eligible: Eligible | None) -> None:
        self.request = request
        self.told = told
        self.eligible = eligible
        self.endpoints: Sequence[Endpoint] = ()
        """Those that may get it."""
        self.until_s = 0.0
        """It waits no longer, by the event loop's clock."""


class Deciding:
    """Decisions of this process' own router.

    Token ids are looked for only where an endpoint that may get the request tells what its cache holds, and
    its blocks in the shared index only where there is one and what we were told ourselves is not enough. Both
    have ``budget_s`` in all.
    """

    def __init__(
        self,
        router: Router,
        blocks: BlockIndex,
        tokens: Tokens,
        shared: SharedBlocks | None = None,
        budget_s: float = 0.0,
    ) -> None:
        self._router = router
        self._blocks = blocks
        self._tokens = tokens
        self._shared = shared
        self._budget_s = budget_s

    def open(self, request: InferenceRequest, told: Told, eligible: Eligible | None = None) -> None:
        try:
            if request.prompts and self._blocks.slots:
                asked = _Asked(request, told, eligible)
                if not self._inform(asked):
                    return
                request = asked.request
            flight = self._router.open(request, eligible)
        except PointsmanError as error:
            told(error)
        else:
            told(flight)

    def reopen(self, flight: Flight, told: Callable[[bool], None]) -> None:
        told(self._router.reopen(flight))

    # -- what is to be known first

    def _inform(self, asked: _Asked) -> bool:
        """Add what anybody has a use for; False where that comes later, and the decision with it."""
        request = asked.request
        asked.endpoints = self._router.candidates(request.model, asked.eligible)
        if self._blocks.slots.isdisjoint([endpoint.slot for endpoint in asked.endpoints]):
            return True
        if self._shared:
            asked.until_s = asyncio.get_running_loop().time() + self._budget_s
        answer = self._tokens.ask(request, asked.endpoints)
        if isinstance(answer, asyncio.Future):
            answer.add_done_callback(partial(self._found, asked))
            return False
        asked.request = completed(request, answer)
        return self._read(asked)

    def _found(self, asked: _Asked, answer: asyncio.Future[Found]) -> None:
        asked.request = completed(asked.request, answer.result())
        if self._read(asked):
            self._decide(asked)

    def _read(self, asked: _Asked) -> bool:
        if self._shared is None or not asked.request.tokenized:
            return True
        left_s = asked.until_s - asyncio.get_running_loop().time()
        reading = self._shared.read(asked.request, asked.endpoints, left_s)
        if isinstance(reading, asyncio.Future):
            reading.add_done_callback(partial(self._was_read, asked))
            return False
        asked.request = unread(asked.request, reading)
        return True

    def _was_read(self, asked: _Asked, reading: asyncio.Future[str]) -> None:
        asked.request = unread(asked.request, reading.result())
        self._decide(asked)

    def _decide(self, asked: _Asked) -> None:
        try:
            result: Flight | PointsmanError = self._router.open(asked.request, asked.eligible)
        except PointsmanError as error:
            result = error
        except Exception:  # a plugin's bug must not leave the client without an answer
            log.exception("request for %s could not be decided", asked.request.path)
            result = PointsmanError("Internal error; see the log.")
        asked.told(result)


def completed(request: InferenceRequest, found: Found) -> InferenceRequest:
    """The request with what was found of its prompts' tokens, or why nothing was."""
    return replace(request, untokenized=found.reason) if found.reason else found.added_to(request)


def unread(request: InferenceRequest, reason: str) -> InferenceRequest:
    """The request with why its blocks were not read from the shared index, if they were not."""
    return replace(request, untokenized=reason) if reason else request
