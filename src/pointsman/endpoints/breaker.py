"""A circuit breaker: leaves a failing endpoint alone and lets one request at a time find out whether it is
back.
"""

from __future__ import annotations

from enum import Enum

from pointsman.config import Breaker as BreakerSettings


class State(Enum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"
    """Waiting for one probe, or for its end."""


class Breaker:
    """Faults are real ones only: connect errors, resets, timeouts, 5xx other than 503. Times are the
    caller's.
    """

    __slots__ = ("_faults", "_open_s", "_settings", "probing", "retry_at_s", "state")

    def __init__(self, settings: BreakerSettings) -> None:
        self._settings = settings
        self._open_s = min(settings.open_s, settings.max_open_s)
        self._faults = 0
        self.state = State.CLOSED
        self.probing = False
        self.retry_at_s = 0.0

    @property
    def passes(self) -> bool:
        """Whether a request may be sent now."""
        return self.state is State.CLOSED or (self.state is State.HALF_OPEN and not self.probing)

    def success(self) -> bool:
        """A request was answered. Returns whether the state changed."""
        self._faults = 0
        self.probing = False
        changed = self.state is not State.CLOSED
        self.state = State.CLOSED
        self._open_s = min(self._settings.open_s, self._settings.max_open_s)
        return changed

    def fault(self, now: float, *, certain: bool = False) -> bool:
        """A real fault; ``certain`` (nobody listens there) opens at once. Returns whether the state
        changed.
        """
        self._faults += 1
        if self.state is State.CLOSED and not certain and self._faults < self._settings.faults:
            return False
        if self.state is State.HALF_OPEN:
            self._open_s = min(self._open_s * 2, self._settings.max_open_s)
        changed = self.state is not State.OPEN
        self.state = State.OPEN
        self.probing = False
        self.retry_at_s = now + self._open_s
        return changed

    def half_open(self) -> None:
        """Let one request through."""
        if self.state is State.OPEN:
            self.state = State.HALF_OPEN
            self.probing = False

    def abandon(self) -> None:
        """The probe ended without telling anything (the client left)."""
        self.probing = False
