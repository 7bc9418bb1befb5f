"""A request format: the paths it answers to, how a body becomes an ``InferenceRequest``, and how we speak
back.

A file of this folder registers its formats when imported; ``find`` picks one by path.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from pointsman.api import replies
from pointsman.api.usage import openai_usage
from pointsman.errors import PointsmanError
from pointsman.types import InferenceRequest, Usage

Parse = Callable[[str, str, Mapping[str, str], bytes], InferenceRequest]
"""(request id, path, lower-cased headers, body) to a request; raises ``BadRequest`` and nothing else."""


class Counting(Protocol):
    """Token counts out of a response as it comes, where its end alone does not tell."""

    def feed(self, data: bytes) -> None:
        """Its next bytes, cut anywhere."""

    def usage(self) -> Usage:
        """As far as it has come; never raises."""


@dataclass(frozen=True, slots=True)
class Format:
    """One or more paths that share a body shape."""

    name: str
    """The family it belongs to, as ``InferenceRequest.format`` has it: openai, anthropic, vllm, ..."""
    paths: tuple[str, ...]
    """Path suffixes of whole segments: ``/chat/completions`` also answers ``/v1/chat/completions``."""
    parse: Parse
    usage: Callable[[bytes], Usage] = openai_usage
    """Token counts out of the last bytes (16 KiB are enough) of a response, JSON or SSE; never raises."""
    counting: Callable[[], Counting] | None = None
    """Instead of ``usage``, for responses that are not text."""
    error_body: Callable[[PointsmanError], bytes] = replies.openai_error
    stream_error: Callable[[PointsmanError], bytes] = replies.openai_stream_error
    """The SSE event that tells a client in mid-stream that no more will come."""
    exact: bool = False
    """Match whole paths only: another server's ``/api/generate`` is not SGLang's ``/generate``."""
    pattern: re.Pattern[str] | None = None
    """Paths with an id inside, which no suffix describes; searched where no path matches."""


def passthrough(request_id: str, path: str, headers: Mapping[str, str], body: bytes) -> InferenceRequest:
    """A request of which we read nothing: any endpoint will do, load decides."""
    return InferenceRequest(id=request_id, path=path, format="passthrough", body=body, headers=headers)


PASSTHROUGH = Format("passthrough", (), passthrough)
"""For every path that no format answers to."""

_formats: list[Format] = []
_by_path: dict[str, Format] = {}
_by_suffix: dict[str, Format] = {}


def register(*formats: Format) -> None:
    """Make formats known; a path belongs to one format only."""
    for added in formats:
        for path in added.paths:
            assert path not in _by_path, f"two formats answer to {path}"
            _by_path[path] = added
            if not added.exact:
                _by_suffix[path] = added
                _by_path.setdefault("/v1" + path, added)
        _formats.append(added)


def formats() -> tuple[Format, ...]:
    """Every registered format."""
    return tuple(_formats)


def find(path: str) -> Format:
    """The format with the longest matching path suffix, else ``PASSTHROUGH``."""
    known = _by_path.get(path)
    return known if known is not None else _search(path)


_DEEPEST = 4
"""Segments of the longest suffix, with one to spare. A path may be 64 KB of slashes: no more of it is
looked at.
"""


def _search(path: str) -> Format:
    path = path.partition("?")[0].rstrip("/")
    if path in _by_path:
        return _by_path[path]
    segments = path.rsplit("/", _DEEPEST)[1:]
    for first in range(len(segments)):
        known = _by_suffix.get("/" + "/".join(segments[first:]))
        if known is not None:
            return known
    for candidate in _formats:
        if candidate.pattern is not None and candidate.pattern.search(path):
            return candidate
    return PASSTHROUGH
