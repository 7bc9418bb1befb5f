"""Token counts out of the end of a response, without parsing the response.

What comes in is the last bytes that went to the client: JSON or SSE, cut anywhere at its start, with the
chunk framing of HTTP/1.1 still in it wherever the engine happened to flush.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec

from pointsman.types import Usage

_FRAMING = re.compile(rb"\r\n[0-9a-fA-F]+(?:;[^\r\n]*)?\r\n")
_KEY = b'"usage"'
_NEAR = 2048
"""Usage closes a response, so it is nearly always in here; the rest is searched only when it is not."""
_TRIES = 16
"""``"usage"`` also occurs as ``null`` in every chunk; a stream's last few are as far back as we look."""


class _Details(msgspec.Struct, gc=False):
    cached_tokens: int | None = None


class _Counts(msgspec.Struct, gc=False):
    """OpenAI's, the Responses API's and Anthropic's names."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    prompt_tokens_details: _Details | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    input_tokens_details: _Details | None = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None


_decode = msgspec.json.Decoder(_Counts).decode


NO_USAGE = Usage()

_FLAT = b'"usage":{'


def _flat(tail: bytes) -> _Counts | None:
    """The common case: usage without inner objects, as compact JSON, close to the end."""
    start = tail.rfind(_FLAT, -_NEAR) + len(_FLAT) - 1
    end = tail.find(b"}", start) + 1
    if start < len(_FLAT) or not end or tail.find(b"{", start + 1, end) >= 0:
        return None
    try:
        return _decode(tail[start:end])
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def openai_usage(tail: bytes) -> Usage:
    """The last usage object. Embeddings, rerank and score may know a total only: it is all prompt."""
    counts = _flat(tail)
    if counts is None:
        counts = next(_found(tail), None)
        if counts is None:
            return NO_USAGE
    prompt = counts.prompt_tokens if counts.prompt_tokens is not None else counts.input_tokens
    output = counts.completion_tokens if counts.completion_tokens is not None else counts.output_tokens
    details = counts.prompt_tokens_details or counts.input_tokens_details
    if prompt is None and output is None:
        prompt = counts.total_tokens
    return Usage(prompt, output, details.cached_tokens if details else None)


def anthropic_usage(tail: bytes) -> Usage:
    """Output tokens are in ``message_delta``, input tokens may be in ``message_start`` only, while that is
    in sight.

    Anthropic's ``input_tokens`` leaves out what was read from or written to the cache; ours is the whole
    prompt.
    """
    prompt = output = cached = None
    for counts in _found(tail):
        output = counts.output_tokens if output is None else output
        if counts.input_tokens is not None:
            cached = counts.cache_read_input_tokens
            prompt = counts.input_tokens + (cached or 0) + (counts.cache_creation_input_tokens or 0)
            break
    return Usage(prompt, output, cached)


_INTEGERS = {
    key: re.compile(rb'"%s"\s*:\s*(\d{1,15})(?![\d.eE])' % key.encode())
    for key in ("prompt_tokens", "completion_tokens", "cached_tokens")
}


def sglang_usage(tail: bytes) -> Usage:
    """Native SGLang counts in ``meta_info``, which may be of any size; each chunk repeats them."""
    for text in _windows(tail):
        found = {key: hits[-1] for key, number in _INTEGERS.items() if (hits := number.findall(text))}
        if "prompt_tokens" in found:
            prompt, output, cached = (int(found[key]) if key in found else None for key in _INTEGERS)
            return Usage(prompt, output, cached)
    return Usage()


def _windows(tail: bytes) -> Iterator[bytes]:
    """The end, then all of it, both without chunk framing. A stream that ended without usage is not
    searched on.
    """
    near = _unframed(tail[-_NEAR:])
    yield near
    if len(tail) > _NEAR and (_KEY in near or near.count(b"\ndata:") < 2):  # the last event, and [DONE]
        yield _unframed(tail)


def _unframed(text: bytes) -> bytes:
    return _FRAMING.sub(b"", text) if b"\r\n" in text else text


def _found(tail: bytes) -> Iterator[_Counts]:
    """Usage objects from the last to the first; those near the end again when more are asked for."""
    for text in _windows(tail):
        at = len(text)
        for _ in range(_TRIES):
            at = text.rfind(_KEY, 0, at)
            if at < 0:
                break
            counts = _object(text, at + len(_KEY))
            if counts is not None:
                yield counts


def _object(text: bytes, at: int) -> _Counts | None:
    """The little object that is the value of the key ending at ``at``."""
    start = text.find(b"{", at, at + 16)
    if start < 0 or text[at:start].strip(b" \t\r\n") != b":":
        return None
    end = start
    for _ in range(16):  # one closing brace for each object inside
        end = text.find(b"}", end) + 1
        if not end:
            return None
        if text.count(b"{", start, end) == text.count(b"}", start, end):
            break
    try:
        return _decode(text[start:end])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
