"""Promises that are being kept: which endpoints requests with an SLO run on, and which are kept free for
them.

A request with limits goes where they are expected to hold. What keeps them there is that nobody else is
sent to an endpoint where tokens would then take longer than the tightest limit promised on it. While some
endpoint is too busy for that limit, others are *kept*: as many of the quickest as the requests with limits
need. They go only there, and who has no such limit may fill only part of what it allows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import exp, inf, sqrt

import msgspec

from pointsman.predictor.costs import Costs
from pointsman.scheduling.classes import Aim
from pointsman.scheduling.underway import UnderWay
from pointsman.types import Decision, Endpoint, InferenceRequest, Outcome

NEAR = 1.005
"""Limits that are missed by so much more than by the best endpoint are missed just as much."""
KEPT_SHARE = 0.8
"""Of the limit, on a kept endpoint, that others may use up."""
SPARE = 2.0
"""Room is kept for what is usual and so many standard deviations more, as if arrivals were Poisson."""
DEMAND_MEMORY_S = 15.0
LOOK_S = 0.25
LATE = 0.99
"""The share of promised requests whose time per token is to be at most what is counted with."""
LATE_STEP = 0.02
LEAST_MARGIN, FIRST_MARGIN, MOST_MARGIN = 1.2, 1.3, 1.6
MEMORY = 100
"""Requests over which their usual size is averaged."""


class _Note(msgspec.Struct, frozen=True, gc=False):
    slot: int
    aim: Aim
    tpot_s: float
    """Expected, with it among them."""
    holds: bool
    """All promises were expected to."""


class _There:
    """Promised requests at one endpoint."""

    __slots__ = ("count", "tpots", "ttfts")

    def __init__(self) -> None:
        self.count = 0
        self.tpots: dict[float, int] = {}
        self.ttfts: dict[float, int] = {}

    def add(self, aim: Aim, times: int) -> None:
        """``times`` is 1 or -1."""
        self.count += times
        for limits, limit_s in ((self.tpots, aim.tpot_s), (self.ttfts, aim.ttft_s)):
            left = limits.get(limit_s, 0) + times
            if left:
                limits[limit_s] = left
            else:
                del limits[limit_s]


class Promises:
    """Leaves endpoints out of a choice so that promises are kept."""

    def __init__(self, costs: Costs, *, fills: bool = False) -> None:
        """``fills``: endpoints are filled one after the other; then none is kept free, and all of them are
        filled only so far.
        """
        self._costs = costs
        self._fills = fills
        self.under_way: UnderWay[_Note] = UnderWay()
        self._there: dict[int, _There] = {}
        self.margin = FIRST_MARGIN
        """Tokens take at most so many times as long as expected, for all but the latest few requests."""
        self.kept: frozenset[int] = frozenset()
        """Slots."""
        self._tightest_s = inf
        """Least TPOT that was promised lately."""
        self._demand = 0.0
        """Requests with such a limit at a time, lately."""
        self._context_tokens = 0.0
        """Of one of them, half-way through its answer."""
        self._uncached = self._outputs = 0.0
        """Prompt tokens to compute, and output tokens, of a promised request."""
        self._pressed = False
        """Some endpoint is too busy for the tightest limit."""
        self._holds = True
        self._known: dict[int, tuple[float, float, float]] = {}
        """What ``_learn`` said at the last look."""
        self._at_s = -inf

    def leave_out(
        self,
        aim: Aim,
        endpoints: Sequence[Endpoint],
        total: list[float],
        cached: Mapping[int, int],
        size: tuple[int, float],
        now_s: float,
    ) -> bool:
        """Make ``total`` infinite where the request, of ``size`` tokens (prompt, answer), would miss its own
        limits or break other promises; where all would, leave those where that is least. Returns whether
        all promises hold.
        """
        if now_s - self._at_s >= LOOK_S:
            self._look(endpoints, now_s)
        keep = self._keep_others if aim.ttft_s == inf == aim.tpot_s else self._keep_all
        self._holds = keep(aim, endpoints, total, cached, size)
        return self._holds

    def _keep_others(
        self,
        aim: Aim,
        endpoints: Sequence[Endpoint],
        total: list[float],
        cached: Mapping[int, int],
        size: tuple[int, float],
    ) -> bool:
        """Nothing was promised to the request itself: only endpoints with promises need a look."""
        there, kept = self._there, self.kept
        if not (there or kept):
            return True
        guarded = [
            i for i, e in enumerate(endpoints) if (e.slot in there or e.slot in kept) and total[i] < inf
        ]
        broken = [self._breaks(aim, *self._times(endpoints[i], size, cached.get(i, 0))) for i in guarded]
        others = len(total) - total.count(inf) - len(guarded)
        fewest = 0.0 if others else min(broken, default=0.0)
        for i, count in zip(guarded, broken, strict=True):
            if count > fewest:
                total[i] = inf
        return fewest == 0.0

    def _keep_all(
        self,
        aim: Aim,
        endpoints: Sequence[Endpoint],
        total: list[float],
        cached: Mapping[int, int],
        size: tuple[int, float],
    ) -> bool:
        ttft_s, tpot_s = aim.ttft_s, aim.tpot_s
        there, kept = self._there, self.kept
        able = [i for i, t in enumerate(total) if t < inf]
        missed: dict[int, float] = {}
        broken: dict[int, float] = {}
        for i in able:
            endpoint = endpoints[i]
            slot, first_s, after_s = self._times(endpoint, size, cached.get(i, 0))
            missed[i] = max(1.0, first_s / ttft_s, after_s / tpot_s)
            guarded = slot in there or slot in kept
            broken[i] = self._breaks(aim, slot, first_s, after_s) if guarded else 0.0
        if self._pressed and aim.promised:
            here = [i for i in able if missed[i] == 1.0 and endpoints[i].slot in kept]
            if here:
                for i in set(able) - set(here):
                    total[i] = inf
                able = here
        least = min([missed[i] for i in able], default=1.0) * NEAR
        fewest = min([broken[i] for i in able if missed[i] <= least], default=0.0)
        for i in able:
            if missed[i] > least or broken[i] > fewest:
                total[i] = inf
        return least <= NEAR and fewest == 0.0

    def _times(
        self, endpoint: Endpoint, size: tuple[int, float], cached_tokens: int
    ) -> tuple[int, float, float]:
        """The slot, when the first token would be there, and how long a further one would take at most."""
        costs, slot = self._costs, endpoint.slot
        prompt, length = size
        step_s, token_s = costs.step_s[slot], costs.token_s[slot]
        sequence_s, context_s, stall_s = self._known.get(slot) or self._learn(slot)
        prefill_s = costs.queue_s[slot] + (prompt - cached_tokens) * token_s
        more_s = sequence_s + context_s * (prompt + length / 2) + (endpoint.load.requests + 1) * stall_s
        more_s += prefill_s / (self._outputs or length or 1.0)  # those that decode there wait meanwhile
        tpot_s = (step_s + more_s) * (self.margin / KEPT_SHARE if self._fills else self.margin)
        return slot, step_s + prefill_s, tpot_s

    def _learn(self, slot: int) -> tuple[float, float, float]:
        """What one more request adds to the time of a token: a share of each step, the more the longer it
        is, and the computation of the prompts of those that come after it, if they come as fast as those
        there go.
        """
        _, sequence_s, context_s = self._costs.speeds.by_slot[slot].step
        stall_s = self._uncached / self._outputs * self._costs.token_s[slot] if self._outputs else 0.0
        known = self._known[slot] = sequence_s, context_s, stall_s
        return known

    def _breaks(self, aim: Aim, slot: int, first_s: float, after_s: float) -> float:
        """Promises to requests that are there, or to be expected, that this one would break."""
        count = 0.0
        there = self._there.get(slot)
        if there is not None:
            tpot_s, ttft_s = min(there.tpots), min(there.ttfts)
            if (after_s > tpot_s and aim.tpot_s > tpot_s) or (first_s > ttft_s and aim.ttft_s > ttft_s):
                count = there.count
        if slot in self.kept and aim.tpot_s > self._tightest_s and after_s > KEPT_SHARE * self._tightest_s:
            count = max(count, self._demand / len(self.kept))
        return count

    def _look(self, endpoints: Sequence[Endpoint], now_s: float) -> None:
        """Look at speeds again, and keep as many endpoints as are needed."""
        passed_s, self._at_s = now_s - self._at_s, now_s
        self._known.clear()
        if self._fills:
            return
        limits = [s for there in self._there.values() for s, n in there.tpots.items() for _ in range(n)]
        here_s = min(limits, default=inf)
        if here_s <= self._tightest_s:
            self._tightest_s = here_s
        elif self._demand < 0.5:
            self._tightest_s, self._demand = here_s, 0.0
        tight_s = self._tightest_s
        if tight_s == inf:
            self.kept, self._pressed = frozenset(), False
            return
        now = sum(limit_s <= 2 * tight_s for limit_s in limits)
        self._demand += (now - self._demand) * (1 - exp(-passed_s / DEMAND_MEMORY_S))
        room = {e.slot: self._room(e.slot) for e in endpoints}
        usual = int(self._context_tokens)
        busy = {e.slot: self._times(e, (usual, 0.0), usual)[2] > tight_s for e in endpoints}
        self._pressed = any(busy.values())
        order = sorted(
            (slot for slot, n in room.items() if n >= 1),
            key=lambda s: (
                s not in self.kept or s not in self._there,
                busy[s],
                s not in self.kept,
                -room[s],
                s,
            ),
        )
        need, kept = self._demand + SPARE * sqrt(self._demand), []
        for slot in order:
            if need <= 0:
                break
            kept.append(slot)
            need -= room[slot]
        self.kept = frozenset(kept)

    def _room(self, slot: int) -> float:
        """How many requests with the tightest limit run there within it."""
        base_s = self._costs.speeds.by_slot[slot].step[0]
        sequence_s, context_s, stall_s = self._known.get(slot) or self._learn(slot)
        each_s = sequence_s + context_s * self._context_tokens + stall_s
        return (self._tightest_s / self.margin - base_s) / each_s

    def sent(self, request: InferenceRequest, aim: Aim, decision: Decision, length: float) -> None:
        """The request goes there."""
        self._end(self.under_way.take(request))  # it was sent elsewhere before
        if not aim.promised:
            return
        slot = decision.chosen.slot
        base_s, sequence_s, _ = self._costs.speeds.by_slot[slot].step
        if aim.tpot_s < base_s + sequence_s:
            return  # nobody could keep it, so it binds nobody
        tokens = decision.prompt_tokens + length / 2
        memory = MEMORY if self._context_tokens else 1
        self._context_tokens += (tokens - self._context_tokens) / memory
        self._uncached += (decision.prompt_tokens - decision.matched_tokens - self._uncached) / memory
        self._there.setdefault(slot, _There()).add(aim, 1)
        size = decision.prompt_tokens, length
        _, _, after_s = self._times(decision.chosen, size, decision.matched_tokens)
        self.under_way.note(request, _Note(slot, aim, after_s / self.margin, self._holds))

    def ended(self, request: InferenceRequest, outcome: Outcome) -> None:
        """It is over; learn how much longer its tokens took than expected."""
        note = self.under_way.take(request)
        self._end(note)
        tokens, ttft_s = outcome.usage.output_tokens, outcome.ttft_s
        if (
            not (note and note.aim.tpot_s < inf and request.stream and tokens and tokens > 1)
            or ttft_s is None
        ):
            return
        self._outputs += (tokens - self._outputs) / (MEMORY if self._outputs else 1)
        times = (outcome.duration_s - ttft_s) / (tokens - 1) / note.tpot_s
        if times <= self.margin:
            self.margin = max(LEAST_MARGIN, self.margin - (1 - LATE) * LATE_STEP)
        elif note.holds and self._costs.speeds.settled:
            self.margin = min(MOST_MARGIN, self.margin + LATE * LATE_STEP)

    def _end(self, note: _Note | None) -> None:
        if note is None:
            return
        there = self._there[note.slot]
        there.add(note.aim, -1)
        if not there.count:
            del self._there[note.slot]
