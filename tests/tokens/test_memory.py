"""Pieces remembered: what is kept, and in how much memory."""

from __future__ import annotations

import gc
import random
import tracemalloc

from pointsman.tokens.memory import Memory


def test_the_least_recently_used_goes_first() -> None:
    memory = Memory(3 * 700)
    pieces = [f"{i}" * 100 for i in range(4)]
    for piece in pieces[:3]:
        memory.put(0, piece, b"\0" * 80)
    assert memory.get(0, pieces[:1]) == [b"\0" * 80]
    for _ in range(2):
        memory.put(0, pieces[3], b"\0" * 400)
    assert [ids is not None for ids in memory.get(0, pieces)] == [True, False, True, True]


def test_what_does_not_fit_is_not_kept() -> None:
    memory = Memory(1000)
    memory.put(0, "a" * 2000, b"")
    assert memory.get(0, ["a" * 2000]) == [None]
    assert memory.used_bytes == 0


def test_memory_stays_below_its_bound() -> None:
    bound = 4 << 20
    rng = random.Random(1)
    tracemalloc.start()
    try:
        memory = Memory(bound)
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        for i in range(40_000):
            memory.put(0, f"{i} " + "x" * rng.randrange(200), rng.randbytes(rng.randrange(200)))
            assert memory.used_bytes <= bound
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert bound // 2 < after - before < bound
