"""One scheduling decision in the making: a request, the endpoints still in the race, and facts computed at
most once.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from pointsman.predictor.latency import Latency
from pointsman.prefix.approximate import PrefixIndex, PrefixMatch
from pointsman.prefix.block_index import BlockIndex
from pointsman.scheduling.media import MediaIndex
from pointsman.scheduling.topology import TopologyLabels
from pointsman.types import Clock, Endpoint, InferenceRequest

T = TypeVar("T")

Signal = Callable[["Cycle"], T]
"""A fact several plugins need: a function of the cycle. ``cycle.get(signal)`` computes it at most once."""


class Services:
    """What signals and plugins may ask: the indexes, the clock, the dice. Built once and handed to every
    cycle.
    """

    __slots__ = ("attributes", "clock", "latency", "media", "precise", "prefix", "rng", "topology")

    def __init__(
        self, prefix: PrefixIndex, clock: Clock, rng: random.Random, precise: BlockIndex | None = None
    ) -> None:
        self.prefix = prefix
        self.precise = precise
        self.clock = clock
        self.rng = rng
        self.media = MediaIndex()
        self.topology = TopologyLabels()
        self.attributes: dict[str, Callable[[InferenceRequest], str]] = {}
        """Facts about a request that plugins publish by name for others to read; "" where there is none."""
        self.latency: Callable[[Cycle], Mapping[int, Latency]] = _nothing
        """Predictions of the candidates by slot; a producer takes this place."""

    def match(self, request: InferenceRequest) -> PrefixMatch:
        """What each endpoint holds of the request's prompts: as its engine tells where it does and the
        prompts' tokens are known, else by what was sent there.
        """
        found = self.prefix.match(request)
        if self.precise is not None and request.tokenized:
            told = self.precise.match(request, self.clock())
            if told.slots:
                return found.corrected(told)
        return found


def _nothing(cycle: Cycle) -> Mapping[int, Latency]:
    return {}


class Cycle:
    """``endpoints`` shrinks as filters run; signal values survive, since they speak of all candidates."""

    __slots__ = ("_signals", "candidates", "endpoints", "match", "peer", "request", "services")

    def __init__(self, request: InferenceRequest, endpoints: Sequence[Endpoint], services: Services) -> None:
        self.request = request
        self.candidates = endpoints
        self.endpoints = endpoints
        self.services = services
        self.match = services.match(request)
        """What each endpoint is believed to hold of this request's prompts."""
        self.peer: Endpoint | None = None
        """The endpoint another stage of this request has been given, when there is one."""
        self._signals: dict[Any, Any] = {}

    def get(self, signal: Callable[[Cycle], T]) -> T:
        """The signal's value for this cycle."""
        try:
            value: T = self._signals[signal]
        except KeyError:
            value = self._signals[signal] = signal(self)
        return value
