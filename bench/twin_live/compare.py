"""A case's two runs side by side, and whether the one over HTTP can be believed."""

from __future__ import annotations

from typing import Literal

import msgspec

from pointsman.bench.report import Stage

from .live import Live
from .twin import Spread, ttft_p50_s

TOLERANCE = 0.1
LAG_OF_TTFT = 0.01
"""Mean lag of an event loop as a share of the TTFT: a request meets several loops, some of them twice."""
LATE_OF_TTFT = 0.1
"""The same for how late requests were sent (p99)."""

Verdict = Literal["agrees", "differs", "chaotic", "void"]


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One case under one policy. All but lags are engine seconds."""

    case: str
    policy: str
    seed: int
    speed: float
    twin: Stage
    spread: Spread
    """Of the twin's own runs, with small delays."""
    live: Live
    voided: tuple[str, ...] = ()
    """Why earlier runs over HTTP did not count."""

    @property
    def tok_s_ratio(self) -> float:
        return self.live.stage.output_tok_s / self.twin.output_tok_s

    @property
    def ttft_ratio(self) -> float:
        return ttft_p50_s(self.live.stage) / ttft_p50_s(self.twin)

    @property
    def void(self) -> list[str]:
        """Why the run over HTTP must not be believed, if so: a process that did not keep up with time."""
        return void(self.twin, self.live, self.speed)

    @property
    def verdict(self) -> Verdict:
        """Chaotic: the figures differ, and so do those of the twin's own runs when requests are due some
        milliseconds later. That says nothing about the twin.
        """
        if self.void:
            return "void"
        if max(abs(self.tok_s_ratio - 1), abs(self.ttft_ratio - 1)) <= TOLERANCE:
            return "agrees"
        return "chaotic" if self.spread.width > TOLERANCE else "differs"


def void(twin: Stage, live: Live, speed: float) -> list[str]:
    """The twin's TTFT is the measure: what was measured live has the lag in it."""
    ttft_s = ttft_p50_s(twin) / speed
    reasons = [
        f"the {name} ran {lag.mean_s * 1000:.2f} ms late on average, more than {LAG_OF_TTFT:.0%} of the "
        f"TTFT ({ttft_s * 1000:.0f} ms of our time)"
        for name, lag in live.lags.items()
        if lag.mean_s > LAG_OF_TTFT * ttft_s
    ]
    late = live.stage.late
    if late is not None and late.p99 / speed > LATE_OF_TTFT * ttft_s:
        reasons.append(
            f"the load generator sent requests up to {late.p99 / speed * 1000:.1f} ms late (p99), more than "
            f"{LATE_OF_TTFT:.0%} of the TTFT ({ttft_s * 1000:.0f} ms of our time)"
        )
    return reasons
