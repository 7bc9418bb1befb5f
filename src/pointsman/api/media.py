"""Images, video and audio inside messages: found, named by their content, and weighed in tokens.

A data URL of a megabyte is neither text to count nor bytes to hash block by block. Its place in the
prompt's bytes is taken by its xxh64 hash, repeated until it is as long as the text its tokens would be: so
equal media still match, and the share of a prompt that matches stays a share of its tokens.
"""

from __future__ import annotations

import binascii
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Literal

import msgspec
from msgspec import Raw
from xxhash import xxh64_hexdigest

from pointsman.api.prompts import ABSENT
from pointsman.types import BYTES_PER_TOKEN

Media = tuple[tuple[str, int], ...]
Kind = Literal["image", "video", "audio"]

# llm-d's estimate backend (facts 3.5, and pkg/epp .../tokenizer/mm_estimate.go for audio)
_PIXELS_PER_TOKEN = 1024
_RESOLUTION = (640, 360)
_VIDEO_FPS = 1.0
_CLIP_S = 10.0
_AUDIO_TOKENS_PER_S = 12.5
_AUDIO_TOKENS = 14
_AUDIO_BYTES_PER_S = 16000

# Bounds on what a hostile body can make of us; what lies beyond is left as it is.
_MOST_MEDIA = 128
_MOST_TOKENS = 1 << 15
_MOST_OBJECTS = 1 << 16


class _Part(msgspec.Struct, gc=False):
    """A message, a content part or a tool's result: whatever may hold media or more parts."""

    image_url: Raw = ABSENT
    video_url: Raw = ABSENT
    audio_url: Raw = ABSENT
    input_audio: Raw = ABSENT
    source: Raw = ABSENT
    file: Raw = ABSENT
    file_data: Raw = ABSENT
    content: list[_Part | str] | _Part | str | None = None
    output: list[_Part | str] | _Part | str | None = None


class _Carrier(msgspec.Struct, gc=False):
    """``image_url``, ``input_audio``, Anthropic's ``source``, ``file``: an object around the payload."""

    type: str | None = None
    url: Raw = ABSENT
    data: Raw = ABSENT
    file_data: Raw = ABSENT


_parts = msgspec.json.Decoder(list[_Part | str]).decode
_elements = msgspec.json.Decoder(list[Raw]).decode
_carrier = msgspec.json.Decoder(_Carrier).decode

_GLANCES = 8


def possible(text: bytes) -> bool:
    """Whether OpenAI-style parts may be in ``text``. A no is certain, and cheap where underscores are few.

    One byte is searched by memchr, 32 KB in 0.3 us; a word such as ``"image_url"`` takes longer than parsing
    did. Past one underscore a KB a closer look costs less than more of these.
    """
    at = text.find(b"_")
    for _ in range(_GLANCES + (len(text) >> 10)):
        if at < 0:
            return False
        if text[at + 1 : at + 5] in (b'url"', b"data") or text[at - 6 : at] == b'"input':
            return True
        at = text.find(b"_", at + 1)
    return at >= 0


def condense(text: bytes, headers: Mapping[str, str]) -> tuple[bytes, Media]:
    """The messages in ``text`` (a JSON array) with every payload replaced, and what was, in order."""
    if len(text) > 1 << 20 and text.count(b"{") > _MOST_OBJECTS:
        return text, ()
    try:
        parts = _parts(text)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return text, ()  # not what we think messages are: the engine will say so
    pieces: list[bytes] = []
    media: list[tuple[str, int]] = []
    cursor = 0
    for kind, payload in islice(_payloads(parts), _MOST_MEDIA):
        at = _locate(text, payload, cursor)
        if at < 0:  # out of the order of the document, which no client writes; looking on could take for ever
            break
        digest, weight = xxh64_hexdigest(payload), estimate(kind, payload, headers)
        media.append((digest, weight))
        pieces += text[cursor:at], _filler(digest, weight)
        cursor = at + len(payload)
    return (b"".join([*pieces, text[cursor:]]) if cursor else text), tuple(media)


def _payloads(parts: Sequence[_Part | str]) -> Iterator[tuple[Kind, bytes]]:
    """Kind and text of each URL or base64 string, in the order of the document."""
    for part in parts:
        if isinstance(part, str):
            continue
        raws = _raws(part)
        if raws.count(ABSENT) < len(raws):
            for kind, raw in zip(_KINDS, raws, strict=True):
                if raw is not ABSENT and (payload := _payload(raw, bare=raw is not part.source)):
                    yield kind, payload
        for inside in (part.content, part.output):
            if isinstance(inside, _Part):
                yield from _payloads((inside,))
            elif isinstance(inside, list):
                yield from _payloads(inside)


_KINDS: tuple[Kind, ...] = ("image", "video", "audio", "audio", "image", "image", "image")


def _raws(part: _Part) -> tuple[Raw, ...]:
    """Its media fields, of ``_KINDS``; a file is mostly pages, so it is weighed as an image."""
    return (
        part.image_url,
        part.video_url,
        part.audio_url,
        part.input_audio,
        part.source,
        part.file,
        part.file_data,
    )


def _payload(raw: Raw, *, bare: bool) -> bytes:
    """The string inside, or around which, ``raw`` is; empty where there is none."""
    text = bytes(raw)
    if text[:1] == b'"':
        return text[1:-1] if bare else b""
    try:
        found = _carrier(raw)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return b""
    if found.type == "text":  # an Anthropic document in plain text is text
        return b""
    for inner in (found.url, found.data, found.file_data):
        if inner is not ABSENT and (text := bytes(inner))[:1] == b'"':
            return text[1:-1]
    return b""


def listed(kind: Kind, raw: Raw, headers: Mapping[str, str]) -> Media:
    """Media given beside the prompt: one string, or lists of them."""
    text = bytes(raw)
    if text[:1] == b'"':
        return ((xxh64_hexdigest(text[1:-1]), estimate(kind, text[1:-1], headers)),)
    if text[:1] != b"[":
        return ()
    found = (one for element in _elements(raw) for one in listed(kind, element, headers))
    return tuple(islice(found, _MOST_MEDIA))


def _locate(text: bytes, payload: bytes, start: int) -> int:
    """Where ``payload`` lies, or -1. Its first bytes are searched: a long needle is slow to prepare."""
    needle = b'"' + payload[:63]
    at = text.find(needle, start) + 1
    while at and not text.startswith(payload, at):
        at = text.find(needle, at) + 1
    return at or -1


def _filler(digest: str, weight: int) -> bytes:
    length = weight * BYTES_PER_TOKEN
    return (digest * (length // len(digest) + 1))[:length].encode()


def estimate(kind: Kind, payload: bytes, headers: Mapping[str, str]) -> int:
    """Tokens a payload stands for: an image by its pixels, video and audio by their seconds. At least 1."""
    return min(max(1, _ESTIMATES[kind](payload, headers)), _MOST_TOKENS)


def _image_tokens(payload: bytes, headers: Mapping[str, str]) -> int:
    width, height = _pixels(payload) or _RESOLUTION
    return width * height // _PIXELS_PER_TOKEN


def _video_tokens(payload: bytes, headers: Mapping[str, str]) -> int:
    width, height = _resolution(headers.get("x-llm-d-video-resolution", "")) or _RESOLUTION
    seconds = _seconds(headers.get("x-llm-d-video-duration-seconds", ""))
    return int(seconds * _VIDEO_FPS) * max(1, width * height // _PIXELS_PER_TOKEN)


def _audio_tokens(payload: bytes, headers: Mapping[str, str]) -> int:
    inline = 0 if payload.startswith((b"http:", b"https:", b"file:")) else len(payload) * 3 // 4
    return _AUDIO_TOKENS + int(_AUDIO_TOKENS_PER_S * (inline / _AUDIO_BYTES_PER_S or _CLIP_S))


_ESTIMATES: dict[Kind, Callable[[bytes, Mapping[str, str]], int]] = {
    "image": _image_tokens,
    "video": _video_tokens,
    "audio": _audio_tokens,
}


_MOST = 1 << 14
"""Pixels a side, or seconds of a clip: what claims more is not believed."""


def _resolution(text: str) -> tuple[int, int] | None:
    width, _, height = text.lower().partition("x")
    if width.isdecimal() and height.isdecimal() and len(text) < 12:
        return min(int(width), _MOST), min(int(height), _MOST)
    return None


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        return _CLIP_S
    return seconds if 0 < seconds <= _MOST else _CLIP_S


_HEAD = 64
_JPEG_HEAD = 1 << 16
"""Base64 characters looked at: a JPEG's size comes after its EXIF data and colour profile."""


def _pixels(payload: bytes) -> tuple[int, int] | None:
    """Width and height out of the head of an inline PNG, GIF or JPEG."""
    start = payload.find(b"base64,", 0, 64) + 7 if payload.startswith(b"data:") else 0
    head = _decoded(payload, start, _HEAD)
    width = height = 0
    if head.startswith(b"\x89PNG\r\n\x1a\n") and len(head) >= 24:
        width, height = struct.unpack_from(">II", head, 16)
    elif head.startswith(b"GIF8") and len(head) >= 10:
        width, height = struct.unpack_from("<HH", head, 6)
    elif head.startswith(b"\xff\xd8"):
        width, height = _jpeg(_decoded(payload, start, _JPEG_HEAD))
    return (width, height) if 0 < width <= _MOST and 0 < height <= _MOST else None


def _decoded(payload: bytes, start: int, length: int) -> bytes:
    encoded = payload[start : start + length]
    try:
        return binascii.a2b_base64(encoded[: len(encoded) // 4 * 4])
    except binascii.Error:
        return b""


def _jpeg(head: bytes) -> tuple[int, int]:
    """Walk the segments to the frame header (SOF0 to SOF15, without DHT, JPG and DAC)."""
    at = 2
    while at + 9 <= len(head) and head[at] == 0xFF:
        marker, length = head[at + 1], int.from_bytes(head[at + 2 : at + 4], "big")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", head, at + 5)
            return width, height
        at += 2 + length
    return 0, 0
