"""What a client was promised, from llm-d's request headers."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import msgspec

from pointsman.types import InferenceRequest

TTFT_HEADERS = ("x-llm-d-slo-ttft-ms", "x-slo-ttft-ms")
TPOT_HEADERS = ("x-llm-d-slo-tpot-ms", "x-slo-tpot-ms")
"""The new name and the old one; the new one counts."""


class Slo(msgspec.Struct, frozen=True, gc=False):
    """Times that were promised; 0.0 where nothing was."""

    ttft_s: float = 0.0
    tpot_s: float = 0.0

    def __bool__(self) -> bool:
        return self.ttft_s > 0 or self.tpot_s > 0


NONE = Slo()


def promised(request: InferenceRequest) -> Slo:
    """The request's SLO. A header that is no positive number promises nothing."""
    headers = request.headers
    if not headers or headers.keys().isdisjoint(TTFT_HEADERS + TPOT_HEADERS):
        return NONE
    return Slo(_seconds(request, TTFT_HEADERS), _seconds(request, TPOT_HEADERS))


def _seconds(request: InferenceRequest, headers: Sequence[str]) -> float:
    given = next((request.headers[name] for name in headers if name in request.headers), "")
    try:
        value = float(given) / 1000
    except ValueError:
        return 0.0
    return value if 0 < value < inf else 0.0
