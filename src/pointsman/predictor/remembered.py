"""What an earlier process had learned of speeds, until the endpoints it speaks of are seen again."""

from __future__ import annotations

from math import exp

from msgspec.structs import replace

from pointsman.predictor.fit import HALF_LIFE_S, StepFit
from pointsman.predictor.lengths import model_key
from pointsman.predictor.state import FactorState, KindState, PrefillState, SpeedsState
from pointsman.types import Endpoint

KV_TOLERANCE = 0.03
"""KV caches of a kind differ by so much at most: what is left of a card's memory is never quite the same."""
IDLE_MEMORY_S = 60.0
"""In which an endpoint that shows nothing becomes like its siblings again: it may have recovered."""
WORTH_S = 1.0
"""What stands on fewer seconds of samples is forgotten."""


class Remembered:
    """Hands out what is still true of an endpoint: engine, KV cache and models must be what they were."""

    def __init__(self, state: SpeedsState, at_s: float) -> None:
        """``at_s`` is when it was saved, on the clock of now."""
        self._kinds = state.kinds
        self._taken: set[int] = set()
        self._at_s = at_s
        self._factors = {factor.name: factor for factor in state.endpoints}

    def kind(self, endpoint: Endpoint, now_s: float) -> tuple[StepFit, PrefillState] | None:
        """What was known of endpoints like this one; where their KV size is not told, only of itself."""
        factor = self._factors.get(endpoint.name)
        for i, kind in enumerate(self._kinds):
            its_own = factor is not None and factor.kind == i
            if (kind.kv_blocks or its_own) and _alike(kind, endpoint):
                self._taken.add(i)
                return self._aged(kind, now_s)
        return None

    def factor(self, endpoint: Endpoint, now_s: float) -> FactorState | None:
        """How it differed from its siblings."""
        factor = self._factors.get(endpoint.name)
        if factor is None or not _alike(self._kinds[factor.kind], endpoint):
            return None
        return self._faded(factor, factor.kind, now_s)

    def rest(self, first: int, now_s: float) -> tuple[list[KindState], list[FactorState]]:
        """Of kinds that have not been seen again, as long as it is worth keeping; they get the places from
        ``first`` on.
        """
        kinds: list[KindState] = []
        places: dict[int, int] = {}
        for i, kind in enumerate(self._kinds):
            fit, prefill = self._aged(kind, now_s)
            if i not in self._taken and fit.weight_s >= WORTH_S:
                places[i] = first + len(kinds)
                kinds.append(replace(kind, fit=fit.state(), prefill=prefill))
        known = [f for f in self._factors.values() if f.kind in places]
        return kinds, [self._faded(factor, places[factor.kind], now_s) for factor in known]

    def _aged(self, kind: KindState, now_s: float) -> tuple[StepFit, PrefillState]:
        fit = StepFit.restored(kind.fit, self._at_s)
        fit.age(now_s)
        kept = 0.5 ** ((now_s - self._at_s) / HALF_LIFE_S)
        return fit, PrefillState(kind.prefill.seconds * kept, kind.prefill.tokens * kept)

    def _faded(self, factor: FactorState, place: int, now_s: float) -> FactorState:
        kept = exp(-(now_s - self._at_s) / IDLE_MEMORY_S)
        return FactorState(factor.name, place, factor.drift * kept, factor.drift_weight_s * kept, factor.said)


def same_cache(kind: KindState, endpoint: Endpoint) -> bool:
    metrics = endpoint.metrics
    return (
        kind.engine == endpoint.engine
        and kind.block_tokens == metrics.block_tokens
        and abs(kind.kv_blocks - metrics.kv_blocks) <= KV_TOLERANCE * kind.kv_blocks
    )


def _alike(kind: KindState, endpoint: Endpoint) -> bool:
    if not same_cache(kind, endpoint):
        return False
    served = endpoint.models
    return not kind.models or not served or not {model_key(m) for m in served}.isdisjoint(kind.models)
