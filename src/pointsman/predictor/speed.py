"""How fast each endpoint is: the step time of its kind, and how it differs from its siblings.

Evidence is progress, not finished requests: how many tokens came out of an endpoint in a fraction of a
second while so many sequences ran there. The engine's own counters say it best; without them the bytes of
our streams do. A first token says how fast prompts are computed.

Two layers keep it steady: endpoints of a kind (same engine, same KV cache) share one fit, which sees the
loads of all of them; and a factor for each endpoint, quick to follow, tells a throttled one from its
siblings.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import exp, log

import msgspec

from pointsman.predictor.drift import Drift
from pointsman.predictor.fit import HALF_LIFE_S, PRIOR, Coefficients, StepFit
from pointsman.predictor.lengths import model_key
from pointsman.predictor.remembered import IDLE_MEMORY_S, KV_TOLERANCE, Remembered
from pointsman.predictor.state import (
    MAX_KINDS,
    MAX_MODELS,
    FactorState,
    KindState,
    PrefillState,
    SpeedsState,
    rounded,
)
from pointsman.types import Endpoint

SAMPLE_S = 0.25
MAX_GAP_S = 1.0
"""Between two looks: after a longer one nobody knows how many sequences there were meanwhile."""
QUIET_SAMPLE_S = 0.2
PREFILL_SAMPLE_S = 2.0
"""Length of a sample without and with prefill in it."""
MAX_PREFILL_SHARE = 0.6
"""Of a sample: with more it says nothing of what a decode step is made of, and little of the factor."""
FACTOR_MEMORY_S = 6.0
FACTOR_PRIOR_S = 1.0
"""An endpoint is believed to be like its siblings as if that had been seen for so long."""
PREFILL_MEMORY_TOKENS = 100_000
PREFILL_PRIOR_TOKENS = 3_000
LEAST_AHEAD_TOKENS = 500
"""Shorter prompts say more of steps than of prefill."""
POOL_PREFILL_TOKENS = 6000.0
MAX_FACTOR = 5.0
STEPS_BEFORE_PREFILL = 1.5
"""A request waits for half of the step under way on average, and its own first token takes one."""
SETTLED_S = 150.0
DOUBT = 0.15
"""A kind's endpoints are off what is known of it by so much on average (logarithm): it is no longer true."""
DEFAULT_BYTES_PER_TOKEN = 220.0
"""A chunk of an OpenAI stream carries about so much for each token."""


class Prefill:
    """Seconds for an uncached prompt token, as a ratio of sums with forgetting."""

    __slots__ = ("seconds", "tokens")

    def __init__(self, seconds: float = 0.0, tokens: float = 0.0) -> None:
        self.seconds = seconds
        self.tokens = tokens

    def add(self, seconds: float, tokens: float) -> None:
        kept = 0.5 ** (tokens / PREFILL_MEMORY_TOKENS)
        self.seconds = self.seconds * kept + seconds
        self.tokens = self.tokens * kept + tokens

    def state(self) -> PrefillState:
        return PrefillState(rounded(self.seconds), rounded(self.tokens))

    def token_s(self, prior_s: float) -> float:
        return (self.seconds + prior_s * PREFILL_PRIOR_TOKENS) / (self.tokens + PREFILL_PRIOR_TOKENS)


class Sample(msgspec.Struct, frozen=True):
    """How long steps lasted on average at one endpoint, and what they had to do."""

    features: tuple[float, float, float, float]
    """As ``StepFit.add`` takes them."""
    step_s: float
    span_s: float
    prefill_tokens: float
    """That were to be computed in it, at most: those that were begun, or those that waited."""


class Kind:
    """Endpoints that are alike as far as can be seen from outside."""

    __slots__ = ("block_tokens", "endpoints", "engine", "factor", "fit", "kv_blocks", "prefill", "said")

    def __init__(self, endpoint: Endpoint, now_s: float, prior: Coefficients) -> None:
        self.engine = endpoint.engine
        self.block_tokens = endpoint.metrics.block_tokens
        self.kv_blocks = endpoint.metrics.kv_blocks
        self.fit = StepFit(now_s, prior)
        self.prefill = Prefill()
        self.factor = 0.0
        """Mean of its endpoints' factors (logarithm)."""
        self.endpoints = 1
        self.said = 0.0
        """The factor that the log tells of."""

    def takes(self, endpoint: Endpoint) -> bool:
        metrics = endpoint.metrics
        return (
            self.kv_blocks > 0
            and self.engine == endpoint.engine
            and self.block_tokens == metrics.block_tokens
            and abs(self.kv_blocks - metrics.kv_blocks) <= KV_TOLERANCE * self.kv_blocks
        )

    def state(self, endpoints: Iterable[Endpoint]) -> KindState:
        """``endpoints`` are its own."""
        models = {model_key(model) for e in endpoints for model in e.models or ()}
        return KindState(
            engine=self.engine,
            block_tokens=self.block_tokens,
            kv_blocks=self.kv_blocks,
            models=tuple(sorted(models)[:MAX_MODELS]),
            fit=self.fit.state(),
            prefill=self.prefill.state(),
        )


class Speed:
    """One endpoint. ``step_s`` is what is believed now."""

    __slots__ = (
        "_ahead",
        "_at_s",
        "_context_s",
        "_drift",
        "_drift_weight_s",
        "_first_outputs",
        "_first_wait_s",
        "_opened_s",
        "_queued",
        "_sequence_s",
        "_sequences",
        "_tokens",
        "_tokens_before",
        "_uncached",
        "_uncached_before",
        "_waiting",
        "kind",
        "log_factor",
        "looked",
        "said",
        "scale",
    )

    def __init__(self, kind: Kind, endpoint: Endpoint, now_s: float) -> None:
        self.kind = kind
        self.log_factor = 0.0
        self.scale = 1.0
        """Its steps last so many times as long as its kind's."""
        self.said = self.looked = 0.0
        """What the log tells of ``log_times``, and what they were at its last look."""
        self._drift = self._drift_weight_s = 0.0
        self._note(endpoint, now_s)
        self._open()

    def _note(self, endpoint: Endpoint, now_s: float) -> None:
        load, metrics = endpoint.load, endpoint.metrics
        self._first_outputs = load.first_outputs
        self._first_wait_s = load.first_wait_s
        self._ahead = load.ahead_tokens
        self._queued = load.tokens
        if metrics.generation_tokens:
            self._at_s, self._tokens = metrics.at_s, metrics.generation_tokens
            self._sequences = metrics.running
            self._uncached = metrics.prefix_queries - metrics.prefix_hits
        else:
            self._at_s, self._tokens = now_s, load.received_bytes / DEFAULT_BYTES_PER_TOKEN
            self._sequences = float(load.requests)
            self._uncached = float(load.ahead_tokens)

    def _open(self) -> None:
        self._opened_s, self._tokens_before, self._uncached_before = self._at_s, self._tokens, self._uncached
        self._sequence_s = self._context_s = 0.0
        self._waiting = self._queued

    @property
    def step(self) -> tuple[float, float, float]:
        """Seconds of a decode step: in any case, for each sequence, for each token of their context."""
        base_s, sequence_s, context_s, _ = self.kind.fit.coefficients
        return self.scale * base_s, self.scale * sequence_s, self.scale * context_s

    @property
    def log_times(self) -> float:
        """Its steps last so many times as long as those of its siblings (logarithm); 0.0 without any."""
        n = self.kind.endpoints
        return (self.log_factor - self.kind.factor) * n / (n - 1) if n > 1 else 0.0

    @property
    def seen_s(self) -> float:
        """Seconds of its own samples behind its factor, the older the less."""
        return self._drift_weight_s

    def step_s(self, sequences: float, context_tokens: float) -> float:
        """Predicted duration of a decode step."""
        base_s, sequence_s, context_s = self.step
        return base_s + sequence_s * sequences + context_s * context_tokens

    def first_tokens(self, endpoint: Endpoint, context_tokens: float) -> tuple[float, int]:
        """What the first tokens since the last look say: seconds of prefill, and for how many tokens."""
        load = endpoint.load
        firsts, ahead = load.first_outputs - self._first_outputs, load.ahead_tokens - self._ahead
        if not firsts or ahead < LEAST_AHEAD_TOKENS * firsts:
            return 0.0, 0
        wait_s = load.first_wait_s - self._first_wait_s
        steps_s = STEPS_BEFORE_PREFILL * firsts * self.step_s(self._sequences, context_tokens)
        return max(0.1 * wait_s, wait_s - steps_s) / self.scale, ahead

    def sample(self, endpoint: Endpoint, now_s: float, context_tokens: float) -> Sample | None:
        """What came out since the last sample, if that was long enough to say something.

        A prompt is counted when it is begun, and takes its time after that; so a sample with prefill in it
        has to be long.
        """
        at_s, tokens, sequences = self._at_s, self._tokens, self._sequences
        self._note(endpoint, now_s)
        passed_s = self._at_s - at_s
        if passed_s > MAX_GAP_S or self._tokens < tokens or not (sequences or self._sequences):
            self._open()
            self._fade(passed_s)
            return None
        self._sequence_s += (sequences + self._sequences) / 2 * passed_s
        self._context_s += context_tokens * passed_s
        span_s = self._at_s - self._opened_s
        prefill = self._uncached - self._uncached_before
        self._waiting = max(self._waiting, self._queued)
        came = self._tokens - self._tokens_before
        if span_s < (PREFILL_SAMPLE_S if prefill else QUIET_SAMPLE_S) or came < 2 * self._sequence_s / span_s:
            return None
        mean = self._sequence_s / span_s
        steps = came / mean
        features = 1.0, mean, self._context_s / span_s, prefill / steps
        found = Sample(features, span_s / steps, span_s, max(prefill, self._waiting))
        self._open()
        return found

    def compare(self, sample: Sample, weight_s: float) -> None:
        """Learn how it differs from its siblings."""
        off = log(max(1 / MAX_FACTOR, min(MAX_FACTOR, sample.step_s / self.kind.fit.step_s(sample.features))))
        kept = exp(-sample.span_s / FACTOR_MEMORY_S)
        self._drift = self._drift * kept + off * weight_s
        self._drift_weight_s = self._drift_weight_s * kept + weight_s
        self._set_factor()

    def _fade(self, passed_s: float) -> None:
        if self._drift_weight_s and passed_s > 0:
            kept = exp(-passed_s / IDLE_MEMORY_S)
            self._drift *= kept
            self._drift_weight_s *= kept
            self._set_factor()

    def state(self, name: str, kind: int) -> FactorState:
        return FactorState(
            name, kind, rounded(self._drift), rounded(self._drift_weight_s), rounded(self.said)
        )

    def recall(self, factor: FactorState) -> None:
        """It differed so from its siblings."""
        self._drift, self._drift_weight_s, self.said = factor.drift, factor.drift_weight_s, factor.said
        self._set_factor()

    def _set_factor(self) -> None:
        self.log_factor = self._drift / (self._drift_weight_s + FACTOR_PRIOR_S)
        self.scale = exp(self.log_factor)


class Speeds:
    """All endpoints of a pool by slot."""

    def __init__(self) -> None:
        self.by_slot: dict[int, Speed] = {}
        self._names: dict[int, str] = {}
        self._kinds: list[Kind] = []
        self._pool: StepFit | None = None
        self._pool_prefill = Prefill(0.5, POOL_PREFILL_TOKENS)
        self._remembered: Remembered | None = None
        self._best_base_s = PRIOR[0]
        self._drift = Drift()

    @property
    def prefill_prior_s(self) -> float:
        return self._pool_prefill.seconds / self._pool_prefill.tokens

    @property
    def settled(self) -> bool:
        """What is known of every kind stands on enough samples, or there is nothing to compare it with."""
        return len(self._kinds) == 1 or all(kind.fit.weight_s >= SETTLED_S for kind in self._kinds)

    def token_s(self, slot: int) -> float:
        """Seconds for an uncached prompt token."""
        speed = self.by_slot[slot]
        return speed.scale * speed.kind.prefill.token_s(self.prefill_prior_s)

    def state(self, endpoints: Iterable[Endpoint], now_s: float) -> SpeedsState | None:
        """What is known of these endpoints, to be kept over a restart; None before anything is."""
        if self._pool is None:
            return None
        self._pool.age(now_s)
        for kind in self._kinds:
            kind.fit.age(now_s)
        members: dict[Kind, list[Endpoint]] = {}
        for endpoint in endpoints:
            if self._names.get(endpoint.slot) == endpoint.name:
                members.setdefault(self.by_slot[endpoint.slot].kind, []).append(endpoint)
        known = sorted(members, key=lambda kind: kind.fit.weight_s, reverse=True)[:MAX_KINDS]
        kinds = [kind.state(members[kind]) for kind in known]
        factors = [
            self.by_slot[e.slot].state(e.name, i) for i, kind in enumerate(known) for e in members[kind]
        ]
        if self._remembered is not None:
            more, their_factors = self._remembered.rest(len(kinds), now_s)
            kinds += more
            factors += their_factors
        return SpeedsState(self._pool.state(), self._pool_prefill.state(), tuple(kinds), tuple(factors))

    def restore(self, state: SpeedsState, at_s: float, now_s: float) -> None:
        """Begin with what was known at ``at_s``, the less the longer ago that is."""
        pool = self._pool = StepFit.restored(state.pool, at_s)
        pool.age(now_s)
        pool.solve(PRIOR)
        kept = 0.5 ** ((now_s - at_s) / HALF_LIFE_S)
        prefill = state.prefill
        kept = min(1.0, max(kept, POOL_PREFILL_TOKENS / prefill.tokens))
        self._pool_prefill = Prefill(prefill.seconds * kept, prefill.tokens * kept)
        self._remembered = Remembered(state, at_s)

    def refresh(self, endpoints: Sequence[Endpoint], now_s: float, contexts: Sequence[float]) -> None:
        """Take a sample of each; ``contexts`` are the tokens of context believed to be decoding there."""
        pool = self._pool
        if pool is None:
            pool = self._pool = StepFit(now_s)
        pool.age(now_s)
        for kind in self._kinds:
            kind.fit.age(now_s, doubted=abs(kind.factor) > DOUBT)
        for endpoint, context in zip(endpoints, contexts, strict=True):
            speed = self._known(endpoint, now_s)
            prefill_s, prefill_tokens = speed.first_tokens(endpoint, context)
            sample = speed.sample(endpoint, now_s, context)
            kind = speed.kind
            if prefill_tokens:
                kind.prefill.add(prefill_s, prefill_tokens)
                self._pool_prefill.add(prefill_s, prefill_tokens)
            if sample is not None:
                busy = sample.prefill_tokens * self.token_s(endpoint.slot) / sample.span_s
                weight_s = sample.span_s * (1.0 - min(busy, MAX_PREFILL_SHARE)) ** 2
                if busy < MAX_PREFILL_SHARE:
                    pool.add(sample.features, sample.step_s, weight_s)
                    own_s = sample.step_s / exp(speed.log_factor - kind.factor)
                    kind.fit.add(sample.features, own_s, weight_s)
                # Always: where the factor is wrong, so is the time that prefill is believed to take.
                speed.compare(sample, weight_s)
        self._solve(pool)
        self._drift.look(((e.name, self.by_slot[e.slot]) for e in endpoints), now_s)

    def _known(self, endpoint: Endpoint, now_s: float) -> Speed:
        slot = endpoint.slot
        speed = self.by_slot.get(slot)
        if speed is None or self._names[slot] != endpoint.name or not self._same(speed.kind, endpoint):
            kind = next((k for k in self._kinds if k.takes(endpoint)), None)
            if kind is None:
                kind = Kind(endpoint, now_s, self._prior())
                self._kinds.append(kind)
                self._recall_kind(kind, endpoint, now_s)
            speed = self.by_slot[slot] = Speed(kind, endpoint, now_s)
            self._names[slot] = endpoint.name
            factor = self._remembered.factor(endpoint, now_s) if self._remembered else None
            if factor is not None:
                speed.recall(factor)
        return speed

    def _recall_kind(self, kind: Kind, endpoint: Endpoint, now_s: float) -> None:
        found = self._remembered.kind(endpoint, now_s) if self._remembered else None
        if found is not None:
            kind.fit, prefill = found
            kind.fit.solve(self._prior())
            kind.prefill = Prefill(prefill.seconds, prefill.tokens)

    def _same(self, kind: Kind, endpoint: Endpoint) -> bool:
        return kind.takes(endpoint) or not (kind.kv_blocks or endpoint.metrics.kv_blocks)

    def _prior(self) -> Coefficients:
        """The pool's mean, but as quick as its quickest at rest: who is not known yet must be tried."""
        assert self._pool is not None
        return (self._best_base_s, *self._pool.coefficients[1:])

    def _solve(self, pool: StepFit) -> None:
        pool.solve(PRIOR)
        used: dict[Kind, list[float]] = {}
        for speed in self.by_slot.values():
            used.setdefault(speed.kind, []).append(speed.log_factor)
        self._kinds = list(used)
        known = [kind.fit.coefficients[0] for kind in self._kinds if kind.fit.weight_s > 1]
        self._best_base_s = min(known, default=PRIOR[0])
        prior = self._prior()
        for kind, factors in used.items():
            kind.factor = sum(factors) / len(factors)
            kind.endpoints = len(factors)
            kind.fit.solve(prior)
