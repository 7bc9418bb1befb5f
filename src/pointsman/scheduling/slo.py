"""What a client was promised, from llm-d's request headers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf

import msgspec

from pointsman.types import TPOT_HEADERS, TTFT_HEADERS, InferenceRequest


class Slo(msgspec.Struct, frozen=True, gc=False):
    """Times that were promised; 0.0 where nothing was."""

    ttft_s: float = 0.0
    tpot_s: float = 0.0

    def __bool__(self) -> bool:
        return self.ttft_s > 0 or self.tpot_s > 0


NONE = Slo()


_TTFT, _OLD_TTFT = TTFT_HEADERS
_TPOT, _OLD_TPOT = TPOT_HEADERS


def promises(headers: Mapping[str, str]) -> bool:
    """Whether one of the headers is there."""
    return _TTFT in headers or _TPOT in headers or _OLD_TTFT in headers or _OLD_TPOT in headers


def promised(request: InferenceRequest) -> Slo:
    """The request's SLO. A header that is no positive number promises nothing."""
    if not promises(request.headers):
        return NONE
    return Slo(_seconds(request, TTFT_HEADERS), _seconds(request, TPOT_HEADERS))


def _seconds(request: InferenceRequest, headers: Sequence[str]) -> float:
    given = next((request.headers[name] for name in headers if name in request.headers), "")
    try:
        value = float(given) / 1000
    except ValueError:
        return 0.0
    return value if 0 < value < inf else 0.0
