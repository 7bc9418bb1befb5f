"""Virtual time: what is to happen, in the order of its moments."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class Events:
    """``now_s`` jumps from one event to the next. Events of one moment happen in the order they were asked
    for, so a run is the same every time.
    """

    __slots__ = ("_asked", "_heap", "now_s")

    def __init__(self) -> None:
        self.now_s = 0.0
        self._asked = 0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []

    def clock(self) -> float:
        """The virtual time in seconds, for everybody who takes a ``Clock``."""
        return self.now_s

    def at(self, at_s: float, call: Callable[..., None], *args: Any) -> None:
        """``call(*args)`` will be called when it is ``at_s``; at once when that is past. It cannot be taken
        back: whoever asked looks whether it still matters.
        """
        self._asked += 1
        heapq.heappush(self._heap, (at_s if at_s > self.now_s else self.now_s, self._asked, call, args))

    def run_until(self, over: Callable[[], bool]) -> None:
        """Let time pass until ``over()`` says so or nothing is left to happen."""
        heap = self._heap
        while heap and not over():
            self.now_s, _, call, args = heapq.heappop(heap)
            call(*args)
