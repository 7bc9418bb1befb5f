"""Endpoints whose speed has changed, said once for each change."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from math import exp, inf, log
from typing import TYPE_CHECKING

from pointsman.predictor.fit import HALF_LIFE_S

if TYPE_CHECKING:
    from pointsman.predictor.speed import Kind, Speed

logger = logging.getLogger(__name__)

CHANGE = log(1.5)
"""What is worth a line."""
EVERY_S = 1.0
STEADY = log(1.06)
"""Since the last look: what still moves is said when it is over."""
SEEN_S = 3.0
"""Of the endpoint itself lately: less is no reason to say anything."""
KIND_SEEN_S = 30.0
"""Of its kind: until then everything moves, because it is being learned."""


class Drift:
    """Compares each endpoint with its siblings, and each kind with itself before.

    A kind's fit takes up in time what lasts, and its factors go back to where they were; what has been said
    of it is forgotten as quickly. The factors among siblings stay.
    """

    def __init__(self) -> None:
        self._at_s = -inf

    def look(self, speeds: Iterable[tuple[str, Speed]], now_s: float) -> None:
        """At these endpoints, by name, as often as one likes."""
        if now_s - self._at_s < EVERY_S:
            return
        kept = 0.5 ** ((now_s - self._at_s) / HALF_LIFE_S)
        self._at_s = now_s
        kinds: dict[Kind, str] = {}
        for name, speed in speeds:
            kinds.setdefault(speed.kind, name)
            off, before = speed.log_times, speed.looked
            speed.looked = off
            if (
                abs(off - before) < STEADY
                and abs(off - speed.said) >= CHANGE
                and speed.seen_s >= SEEN_S
                and _known(speed.kind)
            ):
                logger.info(
                    "endpoint speed changed: %s: a step takes %.2f times as long as at %d like it, was %.2f",
                    *(name, exp(off), speed.kind.endpoints - 1, exp(speed.said)),
                )
                speed.said = off
        for kind, name in kinds.items():
            kind.said *= kept
            off = kind.factor - kind.said
            if abs(off) < CHANGE and _known(kind):
                continue
            if _known(kind):
                logger.info(
                    "endpoint speed changed: %s%s: a step takes %.2f times as long as before",
                    *(name, f" and {kind.endpoints - 1} like it" if kind.endpoints > 1 else "", exp(off)),
                )
            kind.said = kind.factor


def _known(kind: Kind) -> bool:
    return kind.fit.weight_s >= KIND_SEEN_S
