"""What is known of the truth about one endpoint's cache."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from pointsman.prefix.kv_source import KvEventSource
from pointsman.proxy.cache_truth.causes import Evidence, causes
from pointsman.proxy.cache_truth.counts import Record, Tally
from pointsman.proxy.cache_truth.spans import Span, Spans
from pointsman.proxy.cache_truth.trust import Trust
from pointsman.types import Decision, Endpoint

LATELY_S = 60.0
WHOLE_BLOCKS = 2
"""Computed, so that the engine has something to tell: of one block the last token might be missing."""
BLOCK_TOKENS = 128
"""Where nobody says how large a block is: the largest that is usual."""


class Lately:
    """How much a count has grown within the last minute."""

    __slots__ = ("_seen",)

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque([(float("-inf"), 0)])

    def of(self, count: int, now_s: float) -> int:
        """``count`` is what it is now."""
        seen = self._seen
        if count < seen[-1][1]:  # another source
            seen.clear()
        seen.append((now_s, count))
        while len(seen) > 1 and seen[1][0] <= now_s - LATELY_S:
            seen.popleft()
        return count - seen[0][1]


class CacheOf:
    """One endpoint: what was compared, what is wrong, and whether its events are gone by."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.name = endpoint.name
        self.slot = endpoint.slot
        self.events = Record()
        """Requests whose prediction went by events."""
        self.sent = Record()
        """And the others."""
        self.spans = Spans()
        self.last_span: Span | None = None
        self.by_counters: dict[str, Tally] = {}
        """Spans, by view."""
        self.trust = Trust()
        self.warnings: dict[str, tuple[float, str]] = {}
        """By cause: since when, and in words."""
        self.sources: Sequence[KvEventSource] = ()
        self._untold: list[tuple[float, float]] = []
        """When requests were decided, and when they ended, whose blocks no event may have told of yet: the
        first and the last of them.
        """
        self._losses = Lately()
        self._restarts = Lately()
        self._unreadable = Lately()

    def answered(self, decision: Decision, computed: int, block_tokens: int, now_s: float) -> None:
        """The engine has computed so many prompt tokens."""
        if computed >= WHOLE_BLOCKS * (block_tokens or BLOCK_TOKENS):
            self._untold = [*self._untold[:1], (decision.at_s, now_s)]

    def forget(self) -> None:
        """The engine has started anew: what was seen last says nothing of it."""
        self.events.forget()
        self.sent.forget()
        self.last_span = None
        self._untold = []

    def evidence(self, endpoint: Endpoint, block_tokens: int, now_s: float) -> Evidence:
        sources = self.sources
        return Evidence(
            metrics=endpoint.metrics,
            block_tokens=block_tokens,
            sources=sources,
            events=self.events,
            sent=self.sent,
            span=self.last_span,
            set_aside=self._set_aside(),
            silent_s=self._silent_s(now_s),
            losses=self._losses.of(sum(s.cleared + s.replays_failed for s in sources), now_s),
            restarts=self._restarts.of(sum(s.restarts for s in sources), now_s),
            unreadable=self._unreadable.of(sum(s.malformed + s.skipped for s in sources), now_s),
        )

    def _set_aside(self) -> str:
        trust = self.trust
        if trust.since_s is None:
            return ""
        return f"{trust.reason}. They are tried again after {trust.again_s - trust.since_s:.0f} s"

    def _silent_s(self, now_s: float) -> float:
        told_s = max(
            (s.last_event_s for s in self.sources if s.last_event_s is not None), default=float("-inf")
        )
        self._untold = [(decided_s, ended_s) for decided_s, ended_s in self._untold if decided_s > told_s]
        return now_s - self._untold[0][1] if self._untold else 0.0

    def warn(self, found: Evidence, now_s: float) -> tuple[dict[str, str], list[str]]:
        """The warnings that are new, and the names of those that are over."""
        now = causes(found)
        new = {name: says for name, says in now.items() if name not in self.warnings}
        over = [name for name in self.warnings if name not in now]
        self.warnings = {
            name: (self.warnings[name][0] if name in self.warnings else now_s, says)
            for name, says in now.items()
        }
        return new, over

    @property
    def mark(self) -> tuple[int, ...]:
        """Changes when an engine's stream of events begins anew or is connected again."""
        return tuple(n for s in self.sources for n in (s.restarts, s.cleared, s.replays, s.connected))
