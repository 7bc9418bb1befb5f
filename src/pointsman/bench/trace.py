"""Traces in Mooncake's format: a JSON object a line with ``timestamp`` (ms), ``input_length`` and
``output_length`` (tokens) and ``hash_ids``, one for each 512 tokens of the prompt.

Equal ids become equal text, so prompts share exactly the prefixes that the recorded ones shared.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import msgspec

from pointsman.bench.text import text
from pointsman.bench.workload import Call
from pointsman.errors import SettingsError
from pointsman.types import BYTES_PER_TOKEN

BLOCK_TOKENS = 512
_BLOCKS_KEPT = 16384
"""Texts of blocks kept, 2 KB each; blocks of running conversations come again soon."""


class Row(msgspec.Struct, frozen=True, gc=False):
    """One line of the file; further keys are ignored."""

    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int | str, ...] = ()


class Trace(msgspec.Struct, frozen=True):
    """Recorded requests, in the order of their timestamps; ``faster`` 2.0 halves all times between them."""

    rows: tuple[Row, ...]
    faster: float = 1.0

    def calls(self, seed: int) -> Iterator[Call]:
        """One call a row. Times count from the first row."""

        @lru_cache(maxsize=_BLOCKS_KEPT)
        def block(hash_id: int | str) -> str:
            return text(random.Random(f"trace {seed} {hash_id}"), BLOCK_TOKENS)

        first_ms = self.rows[0].timestamp
        for i, row in enumerate(self.rows):
            tokens = max(1, row.input_length)
            known = "".join([block(hash_id) for hash_id in row.hash_ids])[: tokens * BYTES_PER_TOKEN]
            missing = tokens - len(known) // BYTES_PER_TOKEN
            prompt = known + text(random.Random(f"trace {seed} row {i}"), missing)
            at_s = (row.timestamp - first_ms) / 1000 / self.faster
            yield Call(prompt, tokens, max(1, row.output_length), at_s=at_s)


def read_trace(path: str, *, faster: float = 1.0, limit: int | None = None) -> Trace:
    """The trace in ``path``, its first ``limit`` rows only if given; the error names the line."""
    rows = []
    try:
        with Path(path).open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    rows.append(_row(path, number, line))
                if len(rows) == limit:
                    break
    except OSError as exc:
        raise SettingsError(f"--trace: {path}: {exc.strerror}") from exc
    if not rows:
        raise SettingsError(f"--trace: {path}: has no requests")
    if faster <= 0:
        raise SettingsError("--trace-faster: must be above 0")
    return Trace(tuple(sorted(rows, key=lambda row: row.timestamp)), faster)


def _row(path: str, number: int, line: bytes) -> Row:
    try:
        return msgspec.json.decode(line, type=Row)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise SettingsError(f"--trace: {path}: line {number}: {exc}") from exc
