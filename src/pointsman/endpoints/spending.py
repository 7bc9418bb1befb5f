"""What an endpoint costs while it runs: what was typed, what was read, and what that comes to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import exp

from pointsman.config import Endpoint as EndpointSettings
from pointsman.config import RunningCost

HOUR_S = 3600.0
KWH_J = 3.6e6
WORKING_MEMORY_S = 30.0
"""Over which the draw of a working endpoint is averaged: a decision must not follow each reading."""


class Spending:
    """One endpoint's price and power draw, and what they have come to since it joined.

    An endpoint costs and draws the same whether we use it or not, so all of the time counts; only
    what it draws *while it works* says what work costs there.
    """

    __slots__ = (
        "_at_s",
        "_read_s",
        "_working",
        "energy_j",
        "price_per_hour",
        "reading",
        "spent",
        "typed_watts",
    )

    def __init__(self, now_s: float) -> None:
        self.price_per_hour = 0.0
        self.typed_watts = 0.0
        self.reading: float | None = None
        """Watts, as the page that was read last said."""
        self.spent = 0.0
        """Currency units since it joined, up to the last ``advance``."""
        self.energy_j = 0.0
        """Joules since it joined, up to the last ``advance``."""
        self._at_s = now_s
        self._read_s = now_s
        self._working: float | None = None

    @property
    def draw(self) -> float:
        """Watts now; 0.0 where nobody told."""
        return self.typed_watts if self.reading is None else self.reading

    @property
    def watts(self) -> float:
        """Watts while it works; what was typed until a reading was taken at work."""
        if self._working is not None:
            return self._working
        return self.typed_watts or self.draw

    def settle(
        self, settings: EndpointSettings, labels: Mapping[str, str], engine: str, rules: Sequence[RunningCost]
    ) -> None:
        """Take price and watts from the endpoint's own settings, else from the first rule that has them."""
        fitting = [
            rule
            for rule in rules
            if rule.engine in ("", engine) and all(labels.get(k) == v for k, v in rule.labels.items())
        ]
        self.price_per_hour = settings.price_per_hour or _first([r.price_per_hour for r in fitting])
        self.typed_watts = settings.watts or _first([r.watts for r in fitting])

    def read(self, watts: float, working: bool, now_s: float) -> None:
        """A page says that it draws so many watts, while it is ``working`` or not."""
        self.advance(now_s)
        self.reading = watts
        passed_s, self._read_s = now_s - self._read_s, now_s
        if not working:
            return
        if self._working is None:
            self._working = watts
        else:
            self._working += (watts - self._working) * (1 - exp(-passed_s / WORKING_MEMORY_S))

    def advance(self, now_s: float) -> None:
        """Add up until now."""
        passed_s, self._at_s = now_s - self._at_s, now_s
        self.spent += self.price_per_hour * passed_s / HOUR_S
        self.energy_j += self.draw * passed_s


def _first(values: Sequence[float]) -> float:
    return next(filter(None, values), 0.0)
