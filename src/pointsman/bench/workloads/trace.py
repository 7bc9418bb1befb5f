"""Recorded requests: a trace of ``serve`` (``recorded``), or one in Mooncake's format, which is a JSON
object a line with ``timestamp`` (ms), ``input_length`` and ``output_length`` (tokens) and ``hash_ids``, one
for each 512 tokens of the prompt.

Equal ids become equal text, so prompts share exactly the prefixes that the recorded ones shared.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import msgspec

from pointsman.bench.text import text
from pointsman.bench.workloads.call import Call
from pointsman.bench.workloads.family import Family, Positive, Tokens, says
from pointsman.bench.workloads.passages import Shared
from pointsman.bench.workloads.recorded import calls_of, is_recording, read_recording
from pointsman.errors import SettingsError
from pointsman.types import BYTES_PER_TOKEN

BLOCK_TOKENS = 512


class Trace(Family, frozen=True, tag="trace"):
    """Recorded requests, at their own times where the load gives neither rate nor concurrency. The file is
    what `pointsman serve` writes with the setting `trace.path`, or in Mooncake's format: JSON lines with
    ``timestamp`` (ms), ``input_length``, ``output_length`` and ``hash_ids``, one for each 512 tokens; equal
    ids become equal text.
    """

    path: Annotated[str, says("the file")]
    faster: Annotated[Positive, says("2.0 halves all times between requests")] = 1.0
    last: Annotated[Tokens, says("only so many requests, the last ones; 0: all")] = 0

    def calls(self, seed: int) -> Iterator[Call]:
        """One call a row, in the order of time, which counts from the first; ``SettingsError`` at once if
        the file cannot be used.
        """
        if is_recording(self.path):
            return calls_of(read_recording(self.path, self.last), seed, self.faster)
        return self._calls(read_rows(self.path)[-self.last :], seed)

    def _calls(self, rows: Sequence[Row], seed: int) -> Iterator[Call]:
        blocks = Shared(f"trace {seed}", BLOCK_TOKENS)
        first_ms = rows[0].timestamp
        for i, row in enumerate(rows):
            tokens, output = max(1, row.input_length), max(1, row.output_length)
            known = "".join([blocks.get(hash_id).text for hash_id in row.hash_ids])
            known = known[: tokens * BYTES_PER_TOKEN]
            missing = tokens - len(known) // BYTES_PER_TOKEN
            prompt = known + text(random.Random(f"trace {seed} row {i}"), missing)
            at_s = (row.timestamp - first_ms) / 1000 / self.faster
            yield Call(prompt, tokens, output, at_s=at_s, max_tokens=self.told(output))


class Row(msgspec.Struct, frozen=True, gc=False):
    """One line of the file; further keys are ignored."""

    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int | str, ...] = ()


def read_rows(path: str) -> list[Row]:
    """What a file recorded, in the order of time; the error names the line."""
    rows = []
    try:
        with Path(path).open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    rows.append(_row(path, number, line))
    except OSError as exc:
        raise SettingsError(f"trace: {path}: {exc.strerror}") from exc
    if not rows:
        raise SettingsError(f"trace: {path}: has no requests")
    return sorted(rows, key=lambda row: row.timestamp)


def _row(path: str, number: int, line: bytes) -> Row:
    try:
        return msgspec.json.decode(line, type=Row)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise SettingsError(f"trace: {path}: line {number}: {exc}") from exc
