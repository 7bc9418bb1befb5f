"""What a plugin can be. A ``Plugin`` struct has one or more of these methods; nothing inherits behaviour.

All of them are synchronous, do no I/O and read time and randomness from the cycle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from pointsman.predictor.learned import Learned
from pointsman.predictor.state import Kept
from pointsman.scheduling.cycle import Cycle, Services
from pointsman.types import Decision, Endpoint, InferenceRequest, Outcome


@runtime_checkable
class Filter(Protocol):
    def filter(self, cycle: Cycle) -> Sequence[Endpoint]:
        """The endpoints to keep: a subset of ``cycle.endpoints``, in their order."""


@runtime_checkable
class Scorer(Protocol):
    def score(self, cycle: Cycle) -> Sequence[float]:
        """One float in [0, 1] for each of ``cycle.endpoints``; more is better."""


@runtime_checkable
class Picker(Protocol):
    def pick(self, cycle: Cycle, scores: Sequence[float]) -> Sequence[Endpoint]:
        """The chosen endpoint, then ordered fallbacks if any: from ``cycle.endpoints``, which is never
        empty.
        """


@runtime_checkable
class ProfileHandler(Protocol):
    def profile(self, cycle: Cycle, names: Sequence[str]) -> str:
        """Which of the configured profiles runs for this request."""


@runtime_checkable
class Preparing(Protocol):
    def prepare(self, services: Services) -> None:
        """Called once before the first request: configure or claim what the services offer."""


@runtime_checkable
class Admitter(Protocol):
    def admit(self, cycle: Cycle) -> None:
        """Raise what the client is to be told when the request is not to be sent anywhere now. Asked before
        the filters.
        """


@runtime_checkable
class DispatchObserver(Protocol):
    def on_dispatch(self, cycle: Cycle, decision: Decision) -> None:
        """The request is about to be sent to ``decision.chosen``."""


@runtime_checkable
class OutcomeObserver(Protocol):
    def on_outcome(self, request: InferenceRequest, decision: Decision, outcome: Outcome) -> None:
        """The request is over; called exactly once for each request that was dispatched."""


@runtime_checkable
class SaturationDetector(Protocol):
    def saturation(self, endpoints: Sequence[Endpoint], now: float) -> float:
        """How full the pool is: 1.0 and more means that it should get nothing new that can wait."""


@runtime_checkable
class Watcher(Protocol):
    """Learns from endpoints also while it decides little."""

    def watch(self, endpoints: Sequence[Endpoint], now: float) -> None: ...


@runtime_checkable
class Learner(Protocol):
    def learned(self, endpoints: Sequence[Endpoint], now: float) -> Mapping[str, Learned]:
        """What it knows of these endpoints, by name; those are missing that it knows nothing of."""


@runtime_checkable
class Keeper(Protocol):
    def keep(self, endpoints: Sequence[Endpoint], now: float) -> Kept | None:
        """What it knows of these endpoints, and whatever else is worth keeping over a restart; None before it
        knows anything.
        """

    def recall(self, kept: Kept, at: float, now: float) -> None:
        """Begin with what was known at ``at``, the less the longer ago that is; before the first request."""
