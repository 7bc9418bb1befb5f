"""Anthropic's Messages API."""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec
from msgspec import Raw

from pointsman.api import media, replies
from pointsman.api.body import Body, Count, Facts, json_parser
from pointsman.api.format import Format, register
from pointsman.api.prompts import ABSENT, opened, prompt, root, text
from pointsman.api.usage import anthropic_usage


class _Messages(Body):
    messages: Raw = ABSENT
    system: Raw = ABSENT
    max_tokens: Count | None = None
    tools: Raw = ABSENT
    cache_salt: Raw = ABSENT
    chat_template_kwargs: Raw = ABSENT


def _messages(body: _Messages, headers: Mapping[str, str]) -> Facts:
    """The system prompt, then the messages: a changed last line of the system prompt must not hide what
    precedes.
    """
    written = bytes(body.messages)
    if written[:1] != b"[":
        return Facts(max_tokens=body.max_tokens)
    written, found = media.condense(written, headers)
    one = prompt(opened(memoryview(_unmarked(_system(body.system) + written))))
    before = root(body.tools, body.cache_salt, body.chat_template_kwargs)
    salt = text(body.cache_salt)
    return Facts((one,), one.tokens, before, body.max_tokens, media=found, cache_salt=salt)


_BILLING = b'"x-anthropic-billing-header'
_blocks = msgspec.json.Decoder(list[Raw]).decode


def _system(raw: Raw) -> bytes:
    """The system prompt without Claude Code's billing line: it differs in every call, and vLLM drops it,
    too.
    """
    text = bytes(raw)
    if text[:1] != b"[" or _BILLING not in text[:256]:
        return text
    return b",".join(block for block in map(bytes, _blocks(raw)) if _BILLING not in block[:64])


_KEY = b'"cache_control"'
_MARK = re.compile(rb',\s*"cache_control"\s*:\s*\{[^{}]*\}')


def _unmarked(text: bytes) -> bytes:
    """Without ``cache_control``: clients move that mark along as a conversation grows, and no engine reads
    it.
    """
    pieces, cursor = [], 0
    at = text.find(_KEY)
    while at >= 0:
        mark = _MARK.match(text, max(text.rfind(b",", cursor, at), 0))
        if mark:
            pieces.append(text[cursor : mark.start()])
            cursor = mark.end()
        at = text.find(_KEY, at + len(_KEY))
    return b"".join([*pieces, text[cursor:]]) if pieces else text


register(
    Format(
        "anthropic",
        ("/v1/messages", "/v1/messages/count_tokens", "/v1/messages/render"),
        json_parser("anthropic", _Messages, _messages),
        usage=anthropic_usage,
        error_body=replies.anthropic_error,
        stream_error=replies.anthropic_stream_error,
    )
)
