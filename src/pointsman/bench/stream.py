"""Reads one streamed answer as its bytes come: when tokens arrived, how it ended, what the engine counted.

Only the events before the first token and the last ones are decoded; those between are counted, which keeps a
chunk at about a microsecond. Splitting the bytes anywhere changes nothing.
"""

from __future__ import annotations

from typing import Any

import msgspec

from pointsman.types import Usage


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: dict[str, Any] = {}


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None


class _Event(msgspec.Struct):
    choices: tuple[_Choice, ...] = ()
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Event).decode
_NOTHING = _Event()
_NO_TOKENS = (b'"choices":[]', b'"choices": []')
"""In an event that only has the usage. Inside a token's text the quotes would be escaped."""


def _event(data: bytes) -> _Event:
    try:
        return _decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return _NOTHING


def _has_token(event: _Event) -> bool:
    """An event that opens a chat answer names the role and has no text yet; all others carry tokens."""
    if not event.choices:
        return False
    return any(
        "role" not in c.delta or any(v for k, v in c.delta.items() if k != "role") for c in event.choices
    )


class Gaps:
    """Inter-token gaps counted by microsecond, to three significant digits."""

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}

    def add(self, gap_s: float) -> None:
        us = int(gap_s * 1e6)
        shift = us.bit_length() - 11
        if shift > 0:
            us = us >> shift << shift
        self.counts[us] = self.counts.get(us, 0) + 1


class Reading:
    """The body of one answer. ``first_s`` and ``last_s`` are the arrivals of the first and last token
    event.
    """

    __slots__ = ("_gaps", "_last", "_rest", "done", "events", "first_s", "last_s")

    def __init__(self, gaps: Gaps) -> None:
        self._gaps = gaps
        self._rest = b""
        self._last = b""
        self.events = 0
        """Token events so far; an engine may put several tokens into one."""
        self.first_s = self.last_s = 0.0
        self.done = False
        """``[DONE]`` has come."""

    def feed(self, data: bytes, now_s: float) -> None:
        """Take the next bytes of the body, which arrived at ``now_s``."""
        if self._rest:
            data = self._rest + data
        if b"\r" in data:
            held = data.endswith(b"\r")
            data = data.replace(b"\r\n", b"\n")
            data, tail = (data[:-1], b"\r") if held else (data, b"")
        else:
            tail = b""
        *blocks, rest = data.split(b"\n\n")
        self._rest = rest + tail
        for block in blocks:
            self._block(block, now_s)

    def finish(self) -> tuple[Usage, str | None]:
        """After the last byte: the engine's token counts, and the error the stream ended in, if any."""
        if self._rest:
            self._block(self._rest, self.last_s)
            self._rest = b""
        last = _event(self._last)
        error = None if last.error is None else self._last.decode(errors="replace")
        counts = last.usage
        if counts is None:
            return Usage(), error
        details = counts.prompt_tokens_details
        cached = details.cached_tokens if details else None
        return Usage(counts.prompt_tokens, counts.completion_tokens, cached), error

    def _block(self, block: bytes, now_s: float) -> None:
        if not block.startswith(b"data:"):
            block = next((line for line in block.split(b"\n") if line.startswith(b"data:")), b"")
            if not block:
                return
        payload = block[5:].strip()
        if payload == b"[DONE]":
            self.done = True
            return
        self._last = payload
        if (
            _NO_TOKENS[0] in payload
            or _NO_TOKENS[1] in payload
            or (not self.events and not _has_token(_event(payload)))
        ):
            return
        if self.events:
            self._gaps.add(now_s - self.last_s)
        else:
            self.first_s = now_s
        self.events += 1
        self.last_s = now_s
