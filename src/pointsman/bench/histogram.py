"""Latency percentiles, exact to the microsecond, and the HDR histogram by which reports can be merged."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Any

import msgspec

from pointsman.errors import SettingsError

_HIGHEST_US = 24 * 3600 * 1_000_000
_DIGITS = 3


class Percentiles(msgspec.Struct, frozen=True, omit_defaults=True):
    """Seconds. ``hdr`` is the histogram itself in microseconds at three significant digits (HdrHistogram V2,
    base64), so that reports of several clients can be merged.
    """

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float
    hdr: str = ""


def load_hdrh() -> Any:
    """The module ``hdrh.histogram``, or one line that says how to get it."""
    try:
        from hdrh import histogram
    except ImportError as exc:
        raise SettingsError("bench needs the package hdrhistogram: pip install 'pointsman[bench]'") from exc
    return histogram


def percentiles(
    values_s: Iterable[float], counts_us: Mapping[int, int] | None = None, *, mergeable: bool = True
) -> Percentiles | None:
    """Of single values [s] and of values counted by microsecond; None when there are none. ``mergeable``
    ones bring their histogram.
    """
    counts = Counter(round(value * 1e6) for value in values_s)
    counts.update(counts_us or {})
    if not counts:
        return None
    ascending = sorted(counts)
    up_to = list(accumulate(counts[us] for us in ascending))
    total = up_to[-1]
    p50, p90, p99 = (
        ascending[bisect_left(up_to, math.ceil(total * percent / 100))] / 1e6 for percent in (50, 90, 99)
    )
    mean_s = sum(us * times for us, times in counts.items()) / total / 1e6
    return Percentiles(total, mean_s, p50, p90, p99, ascending[-1] / 1e6, _hdr(counts) if mergeable else "")


def _hdr(counts_us: Mapping[int, int]) -> str:
    hdr = load_hdrh().HdrHistogram(1, _HIGHEST_US, _DIGITS)
    for us, times in counts_us.items():
        hdr.record_value(min(max(1, us), _HIGHEST_US), times)
    encoded: bytes = hdr.encode()
    return encoded.decode("ascii")
