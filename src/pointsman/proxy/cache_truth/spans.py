"""Predicted against an engine's own counters, where its answers do not say what was cached.

A span runs from one metrics page to another. What we predicted for our requests in it is compared with what
the hit counter grew by; requests that were under way at either end blur the edges by their tokens, so that
much is no error. Where others send requests, too, the counters say nothing of ours, and the span is
dropped.
"""

from __future__ import annotations

import msgspec

from pointsman.proxy.cache_truth.counts import BOUND, RECENT, WORSE, Tally
from pointsman.types import Decision, Load, Metrics

LONG = 16
"""A span ends when its prompts are so many times as long as those under way, or none are."""
LATE = 0.05
"""Of a busy endpoint's requests, so many are told before the page that they are in: some 0.1 s of a span
that is seldom below 5 s. At an idle one we wait for the page.
"""

PAGE_S = 0.5
"""From when an engine writes a page to when it is read, at most."""


class Span(msgspec.Struct, frozen=True):
    """A span that has ended: sums over its requests, tokens."""

    requests: int
    prompt: int
    predicted: int
    sent: int
    """Predicted by what was sent there alone."""
    reported: int
    blur: float
    view: str
    """events, sent, or mixed."""

    @property
    def error(self) -> float:
        return max(0.0, abs(self.predicted - self.reported) - self.blur)

    @property
    def worse(self) -> bool:
        """Events are off by more than they may, and than what was sent would have been."""
        limit = max(BOUND * self.prompt, WORSE * abs(self.sent - self.reported))
        return self.view == "events" and self.error > limit

    @property
    def tally(self) -> Tally:
        return Tally(self.requests, 0, self.prompt, self.predicted, self.reported, round(self.error))


class Spans:
    """The span under way at one endpoint."""

    __slots__ = (
        "_begin",
        "_blur",
        "_by_events",
        "_predicted",
        "_prompt",
        "_requests",
        "_sent",
        "_silent",
        "_told_s",
    )

    def __init__(self) -> None:
        self._begin: Metrics | None = None
        self._told_s = float("-inf")
        self._empty(0)

    def _empty(self, blur: float) -> None:
        self._requests = self._silent = self._by_events = self._prompt = self._predicted = self._sent = 0
        self._blur = blur

    def add(self, decision: Decision, prompt: int, silent: bool, now_s: float) -> None:
        """A request has ended well; ``silent``: its answer did not say what was cached."""
        self._told_s = now_s
        self._requests += 1
        self._silent += silent
        self._by_events += decision.by_events
        self._prompt += prompt
        self._predicted += decision.matched_tokens
        self._sent += decision.sent_tokens * prompt // decision.prompt_tokens

    def unclear(self, tokens: int, now_s: float) -> None:
        """Of a request with so many prompt tokens we do not know whether the engine looked at it."""
        self._told_s = now_s
        self._blur += tokens

    def read(self, metrics: Metrics, load: Load) -> Span | None:
        """The span that ends with this page, which may be one that was read before; None: it goes on, is
        dropped, or every answer in it told for itself.
        """
        begin = self._begin
        if not metrics.prefix_queries or (not load.requests and metrics.at_s <= self._told_s + PAGE_S):
            return None
        if begin is None or metrics.prefix_queries < begin.prefix_queries:  # the engine has started anew
            self._start(metrics, load)
            return None
        under_way = load.context_tokens
        if self._requests < RECENT or metrics.at_s == begin.at_s or self._prompt < LONG * under_way:
            return None
        span = self._end(begin, metrics, under_way)
        self._start(metrics, load)
        return span

    def _end(self, begin: Metrics, metrics: Metrics, under_way: int) -> Span | None:
        blur = self._blur + under_way + (LATE * self._prompt if under_way else 0.0)
        looked_up = metrics.prefix_queries - begin.prefix_queries
        if not self._silent or looked_up > self._prompt * (1 + LATE) + blur:
            return None
        share = self._by_events / self._requests
        return Span(
            self._requests,
            self._prompt,
            self._predicted,
            self._sent,
            round(metrics.prefix_hits - begin.prefix_hits),
            blur,
            "events" if share == 1 else "sent" if share == 0 else "mixed",
        )

    def _start(self, metrics: Metrics, load: Load) -> None:
        self._begin = metrics
        self._empty(load.context_tokens)
