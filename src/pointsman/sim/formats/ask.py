"""What a client asks of an engine, whatever the format; and how a format writes the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias, TypeVar

import msgspec
from msgspec import Raw
from xxhash import xxh64_hexdigest

from pointsman.sim import tokens

T = TypeVar("T")

ABSENT = Raw(b"")
MEDIA_TOKENS = 256
"""Tokens an image, an audio clip or a file stands for."""


class Refused(Exception):
    """An answer with an error status, in vLLM's words (0.32.0)."""

    def __init__(
        self, status: int, message: str, kind: str = "BadRequestError", param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param

    def body(self) -> bytes:
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.status}
        return msgspec.json.encode({"error": error})


class Usage(msgspec.Struct, frozen=True):
    """Token counts of one answer."""

    prompt_tokens: int
    output_tokens: int
    cached_tokens: int

    def openai(self) -> dict[str, object]:
        """As chat and completions report it."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens + self.output_tokens,
            "completion_tokens": self.output_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Choice(msgspec.Struct, frozen=True):
    """One finished output. ``reason`` is ``length`` or ``stop``."""

    index: int
    text: bytes
    reason: str


class Reply(Protocol):
    """Writes one answer. What it gives for a stream are server-sent events, each ending in an empty line."""

    def opening(self) -> Sequence[bytes]:
        """Events before the first token."""
        ...

    def piece(self, index: int, text: bytes, reason: str | None) -> bytes:
        """The next tokens of output ``index``; ``reason`` when they are its last."""
        ...

    def closing(self, choices: Sequence[Choice], usage: Usage) -> Sequence[bytes]:
        """Events after the last token."""
        ...

    def whole(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        """The answer to a request that does not stream."""
        ...


class Context(msgspec.Struct, frozen=True):
    """What the engine adds to a request before the answer can be written."""

    id: str
    """The client's ``X-Request-Id``, or one of ours."""
    created_s: int
    """Unix time."""
    prompts: Sequence[bytes]
    model: str


class Ask(msgspec.Struct, kw_only=True):
    """A request to generate (or embed), read."""

    model: str | None
    prompts: Sequence[bytes]
    """Rendered; four bytes a token."""
    reply: Callable[[Context], Reply]
    max_tokens: int | None = None
    max_tokens_name: str = "max_tokens"
    default_tokens: int | None = None
    """Output where the client sets no limit; None is the engine's own default length."""
    output_tokens: int | None = None
    """Asked for by ``sim_output_tokens``: shorter than ``max_tokens`` ends with reason ``stop``."""
    stream: bool = False
    choices: int = 1
    salt: str = ""
    ignore_eos: bool = False
    generates: bool = True
    """False for an embedding: a prefill and no token."""


def read(body: bytes, kind: type[T]) -> T:
    """``body`` as ``kind``; ``Refused`` naming the place when it is not."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as exc:
        raise Refused(400, f"1 validation error: {exc}", "Bad Request") from exc
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise Refused(
            400, f"[{{'type': 'json_invalid', 'msg': 'JSON decode error: {exc}'}}]", "Bad Request"
        ) from exc


def prompt_list(value: object, name: str = "prompt") -> list[bytes]:
    """A prompt field: a text, a list of token ids, or a list of either."""
    if isinstance(value, list) and value and not isinstance(value[0], int):
        return [_prompt(item, name) for item in value]
    return [_prompt(value, name)]


def _prompt(value: object, name: str) -> bytes:
    if isinstance(value, str):
        return text_bytes(value)
    try:
        return tokens.from_ids(msgspec.convert(value, list[int]))
    except (msgspec.ValidationError, OverflowError) as exc:
        message = f"1 validation error: `{name}` is no text and no list of token ids"
        raise Refused(400, message, "Bad Request") from exc


def text_bytes(text: str) -> bytes:
    """``text`` as UTF-8; lone surrogates, which JSON can carry, are kept."""
    return text.encode(errors="surrogatepass")


class Part(msgspec.Struct):
    """A part of a message's content, of any format."""

    type: str = "text"
    text: str | None = None
    image_url: Raw = ABSENT
    input_audio: Raw = ABSENT
    audio_url: Raw = ABSENT
    video_url: Raw = ABSENT
    file: Raw = ABSENT
    source: Raw = ABSENT
    content: Raw = ABSENT
    input: Raw = ABSENT


Content: TypeAlias = str | list[Part] | None


class Message(msgspec.Struct):
    """A message of a chat, of any format."""

    role: str = "user"
    content: Content = None
    tool_calls: Raw = ABSENT


def render(messages: Sequence[Message], before: Sequence[tuple[str, bytes]] = ()) -> bytes:
    """A chat as one prompt: ``<|role|>``, a line feed, the content; each filled up to whole tokens, so that
    an answer sent back in the next turn is the tokens it was generated as.
    """
    parts: list[bytes] = []
    for role, content in before:
        parts += _rendered(role, content)
    for message in messages:
        parts += _rendered(message.role, content_bytes(message.content) + bytes(message.tool_calls))
    parts.append(tokens.filled(b"<|assistant|>\n", b"\n"))
    return b"".join(parts)


def _rendered(role: str, content: bytes) -> tuple[bytes, bytes]:
    return tokens.filled(b"<|%b|>\n" % role.encode(), b"\n"), tokens.filled(content, b"\n")


def content_bytes(content: Content) -> bytes:
    """A message's content: a text, or parts; media become ``MEDIA_TOKENS`` tokens that tell them apart."""
    if isinstance(content, str):
        return text_bytes(content)
    return b"".join(map(_part, content or ()))


def _part(part: Part) -> bytes:
    if part.text is not None:
        return text_bytes(part.text)
    media = b"".join(
        map(bytes, (part.image_url, part.input_audio, part.audio_url, part.video_url, part.file, part.source))
    )
    if media:
        return xxh64_hexdigest(media).encode() * (MEDIA_TOKENS * tokens.TOKEN_BYTES // 16)
    return bytes(part.content) + bytes(part.input)


def token_ids(data: bytes) -> bytes:
    """The token ids of ``data`` as JSON."""
    return msgspec.json.encode(tokens.to_ids(data))
