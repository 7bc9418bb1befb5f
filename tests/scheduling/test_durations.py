"""Go's durations in seconds."""

from __future__ import annotations

import pytest

from pointsman.scheduling.durations import seconds


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("200ms", 0.2),
        ("1m30s", 90.0),
        ("1.5h", 5400.0),
        ("0", 0.0),
        ("0s", 0.0),
        ("100us", 1e-4),
        ("2µs", 2e-6),
    ],
)
def test_reads(text: str, want: float) -> None:
    assert seconds(text) == pytest.approx(want)


@pytest.mark.parametrize("text", ["", "5", "s", "5 s", "-1s", "1d", "1s!", "ms1"])
def test_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        seconds(text)
