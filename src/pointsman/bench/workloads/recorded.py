"""Reads the trace that ``serve`` writes (``observability.trace``), and makes prompts that share what the
recorded ones shared.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

import msgspec

from pointsman.bench.text import text
from pointsman.bench.workloads.call import Call
from pointsman.bench.workloads.passages import KEPT_BYTES
from pointsman.errors import SettingsError
from pointsman.observability.trace import (
    FILE_TAG,
    VERSION,
    Fleet,
    Header,
    Traced,
)
from pointsman.types import BYTES_PER_TOKEN, TPOT_HEADERS, TTFT_HEADERS, Ending

SERVED = frozenset({Ending.OK.value, Ending.CANCELLED.value, Ending.FAILED.value})
"""Endings of requests that engines worked on. Those that were refused are not sent again."""
STREAMED_BYTES = 220.0
"""A chunk of an OpenAI stream carries about so much for each token."""
LEAST_TOLD = 20
"""Answers whose length is known before their bytes a token are believed."""
_LINE: TypeAlias = Header | Fleet | Traced

Piece: TypeAlias = tuple[int, int, int]
"""Part of a prompt: of which request's own text, and from and to which block of the prompt."""


class Recording(msgspec.Struct, frozen=True):
    """A whole file. ``requests`` are those that engines worked on, by arrival."""

    header: Header
    fleets: tuple[Fleet, ...]
    requests: tuple[Traced, ...]
    refused: int
    """Requests that ended in an answer without work."""
    prefixes: dict[int, tuple[Piece, ...]]
    """What each prompt is made of, as far as it fills blocks; by number."""
    tokens_per_byte: float
    """Of prompts, as the engines count."""
    output_bytes: float
    """Of a streamed answer for each token."""

    @property
    def span_s(self) -> float:
        """From the first arrival to the last one; never 0."""
        return max(1e-3, self.requests[-1].at_s - self.requests[0].at_s)

    @property
    def block_tokens(self) -> int:
        return max(1, round(self.header.block_bytes * self.tokens_per_byte))

    @property
    def tokens_told(self) -> float:
        """Tokens that an engine counts for each that the router estimates."""
        return self.tokens_per_byte * BYTES_PER_TOKEN

    def prompt_tokens(self, request: Traced) -> int:
        """As the engine counted, or would have."""
        told = request.told_prompt_tokens
        return max(1, round(request.prompt_tokens * self.tokens_told) if told is None else told)

    def output_tokens(self, request: Traced) -> int:
        """As the engine counted; else by the bytes of the answer."""
        if request.output_tokens is not None:
            return max(1, request.output_tokens)
        return max(1, round(request.response_bytes / self.output_bytes))


def is_recording(path: str) -> bool:
    """Whether the file at ``path`` is a trace of ``serve``."""
    try:
        with Path(path).open("rb") as file:
            return file.read(len(FILE_TAG) + 2) == f'["{FILE_TAG}'.encode()
    except OSError:
        return False


def read_recording(path: str, last: int = 0) -> Recording:
    """The file at ``path``, or so many of its last requests. A last line that was cut off is left out;
    ``SettingsError`` names any other one that cannot be read.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as exc:
        raise SettingsError(f"trace: {path}: {exc.strerror}") from exc
    decode = msgspec.json.Decoder(_LINE).decode
    header: Header | None = None
    fleets, requests = [], []
    lines = content.split(b"\n")
    for number, line in enumerate(lines[:-1], 1):  # what follows the last line's end is empty, or cut off
        try:
            record = decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            what = f"line {number}: {exc}" if header else "is no trace of `pointsman serve` (trace.path)"
            raise SettingsError(f"trace: {path}: {what}") from exc
        if isinstance(record, Traced):
            requests.append(record)
        elif isinstance(record, Fleet):
            fleets.append(record)
        else:
            header = record
    if header is None:
        raise SettingsError(f"trace: {path}: is no trace of `pointsman serve` (trace.path)")
    if header.version != VERSION:
        raise SettingsError(f"trace: {path}: is of version {header.version}; this reads version {VERSION}")
    served = sorted((r for r in requests if r.ending in SERVED and r.endpoint), key=lambda r: r.at_s)
    if not served:
        raise SettingsError(f"trace: {path}: has no requests that an engine worked on")
    return Recording(
        header,
        tuple(fleets),
        tuple(served[-last:]),
        len(requests) - len(served),
        _prefixes(requests),
        _tokens_per_byte(served),
        _output_bytes(served),
    )


def _prefixes(requests: Sequence[Traced]) -> dict[int, tuple[Piece, ...]]:
    """In the order of the file: what a prompt shares was in it before."""
    found: dict[int, tuple[Piece, ...]] = {}
    for request in requests:
        pieces: list[Piece] = []
        if request.shared:
            # Lines may be lost when a disk is slow; then the shared part is known by its owner alone.
            for owner, start, stop in found.get(request.like, ((request.like, 0, request.shared),)):
                if start < request.shared:
                    pieces.append((owner, start, min(stop, request.shared)))
        if request.new:
            pieces.append((request.number, request.shared, request.shared + request.new))
        found[request.number] = tuple(pieces)
    return found


def _tokens_per_byte(served: Sequence[Traced]) -> float:
    told = [r for r in served if r.told_prompt_tokens and r.prompt_tokens]
    estimated = sum(r.prompt_tokens for r in told)
    if len(told) < LEAST_TOLD:
        return 1 / BYTES_PER_TOKEN
    return sum(r.told_prompt_tokens or 0 for r in told) / estimated / BYTES_PER_TOKEN


def _output_bytes(served: Sequence[Traced]) -> float:
    told = [r for r in served if r.output_tokens and r.response_bytes and r.stream]
    if len(told) < LEAST_TOLD:
        return STREAMED_BYTES
    return sum(r.response_bytes for r in told) / sum(r.output_tokens or 0 for r in told)


def calls_of(recording: Recording, seed: int, faster: float = 1.0) -> Iterator[Call]:
    """A call for each of the recording's requests, at its time counted from the first."""
    prompts = _Texts(recording, seed)
    first_s = recording.requests[0].at_s
    for request in recording.requests:
        tokens = recording.prompt_tokens(request)
        yield Call(
            prompts.of(request, tokens),
            tokens,
            recording.output_tokens(request),
            at_s=(request.at_s - first_s) / faster,
            max_tokens=request.max_tokens,
            model=request.model,
            headers=_headers(request),
        )


def _headers(request: Traced) -> tuple[tuple[str, str], ...]:
    limits = ((TTFT_HEADERS[0], request.slo_ttft_ms), (TPOT_HEADERS[0], request.slo_tpot_ms))
    return tuple((name, f"{value:g}") for name, value in limits if value is not None)


class _Texts:
    """Makes up prompts: each request has a text of its own, and begins with those of others."""

    def __init__(self, recording: Recording, seed: int) -> None:
        self._recording = recording
        self._block_tokens = recording.block_tokens
        mean_blocks = 1 + sum(r.new for r in recording.requests) // len(recording.requests)
        kept = max(1, KEPT_BYTES // (mean_blocks * self._block_tokens * BYTES_PER_TOKEN))

        def own(number: int, start: int, stop: int) -> str:
            rng = random.Random(f"trace {seed} {number} {start}")
            return text(rng, (stop - start) * self._block_tokens)

        self._own = lru_cache(maxsize=kept)(own)
        self._starts = {
            number: next((p for p in reversed(pieces) if p[0] == number), None)
            for number, pieces in recording.prefixes.items()
        }
        self._seed = seed

    def of(self, request: Traced, tokens: int) -> str:
        parts = [self._piece(piece) for piece in self._recording.prefixes[request.number]]
        known = "".join(parts)[: tokens * BYTES_PER_TOKEN]
        rest = random.Random(f"trace {self._seed} rest {request.number}")
        return known + text(rest, tokens - len(known) // BYTES_PER_TOKEN)

    def _piece(self, piece: Piece) -> str:
        owner, start, stop = piece
        whole = self._starts.get(owner) or piece
        made = self._own(owner, whole[1], whole[2])
        size = self._block_tokens * BYTES_PER_TOKEN
        return made[(start - whole[1]) * size : (stop - whole[1]) * size]
