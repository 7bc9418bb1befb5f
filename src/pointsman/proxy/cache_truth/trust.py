"""Whether one endpoint's events are gone by: set aside when they were wrong, tried again after a while.

Each time the while is twice as long, and only after as long as the longest one has passed without trouble
does it begin anew. So a source that is wrong for good costs some thirty requests every ten minutes.
"""

from __future__ import annotations

PAUSE_S = 60.0
MAX_PAUSE_S = 600.0

Mark = tuple[int, ...]
"""Counts that change when what is known of an endpoint is thrown away, or when it is connected again."""


class Trust:
    """Starts out trusting."""

    __slots__ = ("_early_from_s", "_mark", "_pause_s", "_resumed_s", "again_s", "reason", "since_s", "times")

    def __init__(self) -> None:
        self.times = 0
        """How often they were set aside."""
        self.since_s: float | None = None
        """Set aside since; None: they are trusted."""
        self.again_s = 0.0
        """When they are tried again."""
        self.reason = ""
        """Why they were set aside last."""
        self._pause_s = 0.0
        self._resumed_s = float("-inf")
        self._early_from_s = float("-inf")
        self._mark: Mark = ()

    def set_aside(self, now_s: float, mark: Mark, reason: str) -> None:
        held = now_s - self._resumed_s
        self._pause_s = PAUSE_S if held > MAX_PAUSE_S else min(2 * self._pause_s, MAX_PAUSE_S)
        self.times += 1
        self.since_s, self.again_s = now_s, now_s + self._pause_s
        self._mark, self.reason = mark, reason

    def due(self, now_s: float, mark: Mark) -> str:
        """Why they are to be tried again now; empty: they are not."""
        if self.since_s is None:
            return ""
        if now_s >= self.again_s:
            return "its time is over"
        if mark != self._mark and now_s >= self._early_from_s:
            self._early_from_s = now_s + self._pause_s  # not each time that it begins anew
            return "it has begun anew"
        return ""

    def resume(self, now_s: float) -> None:
        self.since_s = None
        self._resumed_s = now_s
