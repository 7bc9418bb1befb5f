"""What a request costs at each endpoint, in seconds, kept ready so that a decision is a few list walks.

For a request with ``u`` uncached of ``p`` prompt tokens and an answer of ``e`` tokens an endpoint costs
``wait + u * token + e * (output + p * context)``: until its first token, then a step for each token of the
answer, and in both what that costs the sequences there, half of which is counted since on average they are
half done. The four numbers change when the endpoint's load or what is known of its speed does, not with the
request.
"""

from __future__ import annotations

from collections.abc import Sequence

from pointsman.predictor.lengths import Lengths
from pointsman.predictor.speed import SAMPLE_S, Speeds
from pointsman.types import Endpoint, InferenceRequest, Load, Outcome

OTHERS = 0.5
"""Share of the delay to others that counts."""
WAIT = 2.0
"""A second before the first token weighs as much as so many of the answer."""
KV_SHARE = 0.95
"""Of an endpoint's KV cache that may be promised."""
HELD_MEMORY = 100
"""Requests over which the usual new need for KV is averaged."""


class Costs:
    """Lists by slot. ``update`` first, then read."""

    def __init__(self, speeds: Speeds, lengths: Lengths) -> None:
        self.speeds = speeds
        self.lengths = lengths
        self.wait: list[float] = []
        self.token: list[float] = []
        self.output: list[float] = []
        self.context: list[float] = []
        self.room: list[float] = []
        """KV tokens that can still be promised; infinite where the engine does not publish its KV size."""
        self.ttft: list[tuple[float, float]] = []
        """Seconds to the first token: of everything that is before it, and for each uncached token."""
        self.tpot: list[float] = []
        self.usual_hold = 0.0
        """KV tokens that a request newly takes at first, on average."""
        self._names: list[str] = []
        self._at_s = float("-inf")

    def update(self, endpoints: Sequence[Endpoint], now_s: float) -> None:
        """Bring the lists up to date for ``endpoints``: all of them a few times a second, else those whose
        load has changed.
        """
        if self._unknown(endpoints) or now_s - self._at_s >= SAMPLE_S:
            self._at_s = now_s
            self.speeds.refresh(endpoints, now_s, [self._contexts(e.load, now_s, e.slot) for e in endpoints])
            for endpoint in endpoints:
                self._compute(endpoint, now_s)
            return
        for endpoint in endpoints:
            if endpoint.load.changed:
                self._compute(endpoint, now_s)

    def _unknown(self, endpoints: Sequence[Endpoint]) -> bool:
        names = self._names
        most = max([e.slot for e in endpoints])
        if most >= len(names):
            more = most + 1 - len(names)
            names += [""] * more
            for column in (self.wait, self.token, self.output, self.context, self.room, self.tpot):
                column += [0.0] * more
            self.ttft += [(0.0, 0.0)] * more
        return any([names[e.slot] != e.name for e in endpoints])

    def _contexts(self, load: Load, now_s: float, slot: int) -> float:
        """Tokens of context in flight: prompts, and what has been generated since they were sent."""
        return load.context_tokens + self._generated(load, now_s, slot)

    def _generated(self, load: Load, now_s: float, slot: int) -> float:
        if not load.requests:
            return 0.0
        most = load.requests * self.lengths.pool.of_a_token
        tpot = self.tpot[slot]
        age_sum_s = load.requests * now_s - load.since_sum_s
        return min(most / 2, age_sum_s / tpot) if tpot else 0.0

    def _compute(self, endpoint: Endpoint, now_s: float) -> None:
        slot, load, metrics = endpoint.slot, endpoint.load, endpoint.metrics
        load.changed = False
        self._names[slot] = endpoint.name
        speed = self.speeds.by_slot[slot]
        token_s = self.speeds.token_s(slot)
        _, sequence_s, context_s, _ = speed.kind.fit.coefficients
        sequence_s, context_s = sequence_s * speed.scale, context_s * speed.scale
        running = load.requests
        length = self.lengths.pool
        usual = length.of_a_token
        generated = self._generated(load, now_s, slot)
        step_s = speed.step_s(running, load.context_tokens + generated)
        more_s = sequence_s + context_s * usual / 2
        others = OTHERS * running
        self.tpot[slot] = step_s + more_s
        self.ttft[slot] = (step_s + load.tokens * token_s, token_s)
        self.wait[slot] = step_s + WAIT * load.tokens * token_s
        self.token[slot] = token_s * (WAIT + others)
        self.output[slot] = step_s + more_s + others / 2 * more_s
        self.context[slot] = context_s * (1 + others / 2)
        kv_tokens = metrics.kv_blocks * metrics.block_tokens
        if not kv_tokens:
            self.room[slot] = float("inf")
            return
        unseen = max(0.0, running - metrics.running)
        growth = max(running * length.mean - generated, running * length.mean * 0.1)
        self.room[slot] = (KV_SHARE - metrics.kv_usage) * kv_tokens - unseen * self.usual_hold - growth

    def holds(self, tokens: float) -> None:
        """A request that was sent newly takes ``tokens`` of KV at first."""
        self.usual_hold += (tokens - self.usual_hold) / HELD_MEMORY

    def ended(self, request: InferenceRequest, outcome: Outcome) -> None:
        """A request is over."""
        if outcome.usage.output_tokens:
            self.lengths.add(request, outcome.usage.output_tokens)
