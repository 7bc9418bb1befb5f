"""Has a request decided on: at once, or as soon as its prompts' token ids are known.

A front hands in a parsed request and is told what became of it, perhaps before the call returns.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import Protocol

from msgspec.structs import replace

from pointsman.errors import PointsmanError
from pointsman.prefix.precise import PreciseIndex
from pointsman.router import Eligible, Flight, Router
from pointsman.tokens.found import Found
from pointsman.tokens.tokens import Tokens
from pointsman.types import InferenceRequest

log = logging.getLogger(__name__)

Told = Callable[[Flight | PointsmanError], None]
"""Told of a flight, which is then the front's to close, or of what the client is to be told."""


class Opening(Protocol):
    """Where fronts get decisions."""

    def open(self, request: InferenceRequest, told: Told, eligible: Eligible | None = None) -> None:
        """Have it decided on, among the ``eligible``. Tells exactly once."""

    def reopen(self, flight: Flight, told: Callable[[bool], None]) -> None:
        """After a failure: tells whether there is another endpoint that it goes to now."""


class Deciding:
    """Decisions of this process' own router.

    Token ids are looked for only where an endpoint that may get the request tells what its cache holds.
    """

    def __init__(self, router: Router, precise: PreciseIndex, tokens: Tokens) -> None:
        self._router = router
        self._precise = precise
        self._tokens = tokens

    def open(self, request: InferenceRequest, told: Told, eligible: Eligible | None = None) -> None:
        try:
            if self._precise.slots and request.prompts:
                answer = self._ask(request, eligible)
                if isinstance(answer, asyncio.Future):
                    answer.add_done_callback(partial(self._found, request, told, eligible))
                    return
                request = completed(request, answer)
            flight = self._router.open(request, eligible)
        except PointsmanError as error:
            told(error)
        else:
            told(flight)

    def reopen(self, flight: Flight, told: Callable[[bool], None]) -> None:
        told(self._router.reopen(flight))

    def _ask(self, request: InferenceRequest, eligible: Eligible | None) -> Found | asyncio.Future[Found]:
        """The prompts' token ids, if anybody has a use for them."""
        endpoints = self._router.candidates(request.model, eligible)
        if self._precise.slots.isdisjoint([endpoint.slot for endpoint in endpoints]):
            return NOT_WANTED
        return self._tokens.ask(request, endpoints)

    def _found(
        self, request: InferenceRequest, told: Told, eligible: Eligible | None, answer: asyncio.Future[Found]
    ) -> None:
        try:
            result: Flight | PointsmanError = self._router.open(completed(request, answer.result()), eligible)
        except PointsmanError as error:
            result = error
        except Exception:  # a plugin's bug must not leave the client without an answer
            log.exception("request for %s could not be decided", request.path)
            result = PointsmanError("Internal error; see the log.")
        told(result)


NOT_WANTED = Found()


def completed(request: InferenceRequest, found: Found) -> InferenceRequest:
    """The request with what was found of its prompts' tokens, or why nothing was."""
    return replace(request, untokenized=found.reason) if found.reason else found.added_to(request)
