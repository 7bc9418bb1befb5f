"""Every decision of a run as a line of JSON, in the form of ``GET /decisions``."""

from __future__ import annotations

from typing import BinaryIO

import msgspec

from pointsman.observability.decisions import render
from pointsman.types import Decision, InferenceRequest, Outcome


class DecisionLog:
    """An observer that writes decisions in the order in which the requests came. Those that were refused
    before there was a decision have no line.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._encode = msgspec.json.Encoder(order="deterministic").encode
        self._next = 1
        self._ended: dict[int, bytes] = {}
        """Lines of requests that ended before an earlier one did."""

    def __call__(self, request: InferenceRequest, decision: Decision | None, outcome: Outcome) -> None:
        line = b"" if decision is None else self._encode(render(decision)) + b"\n"
        self._ended[int(request.id, 16)] = line
        while self._next in self._ended:
            self._file.write(self._ended.pop(self._next))
            self._next += 1
