"""Predicted against reported, added up: in all, and over the last few requests."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import msgspec

BLOCK = 16
"""Requests that are judged together."""
IN_A_ROW = 2
"""Blocks of them that must be wrong for anything to be done."""
RECENT = BLOCK * IN_A_ROW
"""Requests that are looked back on."""
BOUND = 0.1
"""Share of the prompt tokens by which predictions may be off."""
WORSE = 1.25
"""Events are wrong when they are off by so many times what the index of what was sent is off by. In a burst
of equal prompts both are, by as much: that is nobody's fault.
"""


class Compared(NamedTuple):
    """One request, tokens."""

    predicted: int
    sent: int
    """What was predicted by what was sent there alone."""
    reported: int
    prompt: int
    """As reported."""
    alike: bool
    """We counted as many prompt tokens as the engine."""


class Tally(msgspec.Struct, gc=False):
    """Requests that were compared, and tokens."""

    requests: int = 0
    exact: int = 0
    """Predicted to the token."""
    prompt_tokens: int = 0
    predicted_tokens: int = 0
    reported_tokens: int = 0
    error_tokens: int = 0
    """Differences of single requests without their sign, so that they do not cancel out."""

    def add(self, other: Tally) -> None:
        self.requests += other.requests
        self.exact += other.exact
        self.prompt_tokens += other.prompt_tokens
        self.predicted_tokens += other.predicted_tokens
        self.reported_tokens += other.reported_tokens
        self.error_tokens += other.error_tokens


class Record:
    """The comparisons of one endpoint and one view of it."""

    __slots__ = ("_last", "_since_judged", "_worse_in_a_row", "total")

    def __init__(self) -> None:
        self.total = Tally()
        self._last: deque[Compared] = deque(maxlen=RECENT)
        self.forget()

    def forget(self) -> None:
        """The last requests say nothing of those that come."""
        self._last.clear()
        self._since_judged = self._worse_in_a_row = 0

    def add(self, request: Compared) -> None:
        predicted, _, reported, prompt, _ = request
        total, error = self.total, abs(predicted - reported)
        total.requests += 1
        total.exact += not error
        total.prompt_tokens += prompt
        total.predicted_tokens += predicted
        total.reported_tokens += reported
        total.error_tokens += error
        self._last.append(request)
        self._since_judged += 1
        if self._since_judged == BLOCK:
            self._judge()

    def _judge(self) -> None:
        self._since_judged = 0
        last = list(self._last)[-BLOCK:]
        error = sum(abs(r.predicted - r.reported) for r in last)
        sent_error = sum(abs(r.sent - r.reported) for r in last)
        limit = max(BOUND * sum(r.prompt for r in last), WORSE * sent_error)
        self._worse_in_a_row = self._worse_in_a_row + 1 if error > limit else 0

    # -- the last requests

    @property
    def requests(self) -> int:
        return len(self._last)

    @property
    def predicted_tokens(self) -> int:
        return sum(r.predicted for r in self._last)

    @property
    def reported_tokens(self) -> int:
        return sum(r.reported for r in self._last)

    @property
    def unlike(self) -> int:
        """Requests whose prompts we took for longer or shorter than the engine."""
        return sum(not r.alike for r in self._last)

    @property
    def error(self) -> float:
        """How much of the prompts was predicted wrongly; 0 to 1."""
        return self._share(sum(abs(r.predicted - r.reported) for r in self._last))

    @property
    def sent_error(self) -> float:
        """How much would have been by what was sent alone."""
        return self._share(sum(abs(r.sent - r.reported) for r in self._last))

    def _share(self, tokens: int) -> float:
        return tokens / max(1, sum(r.prompt for r in self._last))

    @property
    def off(self) -> bool:
        """Predictions are off by more than they may."""
        return self.error > BOUND

    @property
    def worse(self) -> bool:
        """And by more than what was sent would have been, for good."""
        return self._worse_in_a_row >= IN_A_ROW
