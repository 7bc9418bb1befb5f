"""Latency percentiles by HDR histogram: microseconds to hours at three significant digits, mergeable."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from pointsman.errors import SettingsError

_HIGHEST_US = 24 * 3600 * 1_000_000
_DIGITS = 3


class Percentiles(msgspec.Struct, frozen=True):
    """Seconds. ``hdr`` is the histogram itself in microseconds (HdrHistogram V2, base64), so that reports of
    several clients can be merged.
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


def percentiles(values_s: Iterable[float], counts_us: Mapping[int, int] | None = None) -> Percentiles | None:
    """Of single values [s] and of values counted by microsecond; None when there are none."""
    hdr = load_hdrh().HdrHistogram(1, _HIGHEST_US, _DIGITS)
    count, total_us, highest_us = 0, 0.0, 0
    for us, times in (*((round(v * 1e6), 1) for v in values_s), *(counts_us or {}).items()):
        hdr.record_value(min(max(1, us), _HIGHEST_US), times)
        count, total_us, highest_us = count + times, total_us + us * times, max(highest_us, us)
    if not count:
        return None
    p50, p90, p99 = (hdr.get_value_at_percentile(p) / 1e6 for p in (50, 90, 99))
    encoded = hdr.encode().decode("ascii")
    return Percentiles(count, total_us / count / 1e6, p50, p90, p99, highest_us / 1e6, encoded)
