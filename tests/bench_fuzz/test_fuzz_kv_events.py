"""The fuzzer of KV events, for a moment: its laws hold, and they can be broken."""

from __future__ import annotations

import random

import pytest
from bench.fuzz_kv_events import Rig, over_sockets, streams

from pointsman.testing.kv_publisher import batch, stored


def test_no_stream_of_messages_crashes_stalls_or_grows_the_intake() -> None:
    streams(100, 1)


async def test_after_any_messages_over_sockets_a_good_one_is_taken() -> None:
    assert await over_sockets(1.0, random.Random(1)) > 0


class Broken:
    """An index that passes its bound, or fails."""

    def __init__(self, used_bytes: int, fails: bool) -> None:
        self.used_bytes = used_bytes
        self._fails = fails

    def apply(self, *event: object) -> None:
        if self._fails:
            raise KeyError(event)


@pytest.mark.parametrize(
    ("index", "broken"), [(Broken(1 << 40, False), AssertionError), (Broken(0, True), KeyError)]
)
def test_a_law_that_is_broken_is_found(index: Broken, broken: type[Exception]) -> None:
    rig = Rig(can_replay=False)
    rig.index = index  # type: ignore[assignment]
    with pytest.raises(broken):
        rig.step("live", (b"kv@", bytes(8), batch(stored([1]))))
