"""Anthropic's messages and their token count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
from msgspec import Raw

from pointsman.sim import tokens
from pointsman.sim.formats.ask import (
    ABSENT,
    Ask,
    Choice,
    Content,
    Context,
    Message,
    Usage,
    content_bytes,
    read,
    render,
)

STOP_REASONS = {"length": "max_tokens", "stop": "end_turn"}


class _Count(msgspec.Struct):
    model: str | None = None
    messages: list[Message] = []
    system: Content = None
    tools: Raw = ABSENT

    def prompt(self) -> bytes:
        before = [("tools", bytes(self.tools)), ("system", content_bytes(self.system))]
        return render(self.messages, [(role, text) for role, text in before if text])


class _Messages(_Count, kw_only=True):
    max_tokens: int
    stream: bool = False
    sim_output_tokens: int | None = None


def messages(body: bytes) -> Ask:
    asked = read(body, _Messages)
    return Ask(
        model=asked.model,
        prompts=[asked.prompt()],
        reply=Answer,
        max_tokens=asked.max_tokens,
        output_tokens=asked.sim_output_tokens,
        stream=asked.stream,
    )


def count_tokens(body: bytes) -> bytes:
    return msgspec.json.encode({"input_tokens": tokens.count(read(body, _Count).prompt())})


class Answer:
    """The answer of ``/v1/messages``. ``input_tokens`` leaves out cached ones, as Anthropic's."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._index = 0

    def opening(self) -> Sequence[bytes]:
        start = {
            "type": "message_start",
            "message": self._message([], None, Usage(self._prompt_tokens(), 0, 0)),
        }
        block = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
        return _event(start), _event(block)

    def piece(self, index: int, text: bytes, reason: str | None) -> bytes:
        return (
            b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,'
            b'"delta":{"type":"text_delta","text":"%b"}}\n\n' % text
        )

    def closing(self, choices: Sequence[Choice], usage: Usage) -> Sequence[bytes]:
        delta = {
            "type": "message_delta",
            "delta": {"stop_reason": STOP_REASONS[choices[0].reason], "stop_sequence": None},
            "usage": _usage(usage),
        }
        return (
            _event({"type": "content_block_stop", "index": 0}),
            _event(delta),
            _event({"type": "message_stop"}),
        )

    def whole(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        content = [{"type": "text", "text": choices[0].text.decode()}]
        return msgspec.json.encode(self._message(content, STOP_REASONS[choices[0].reason], usage))

    def _prompt_tokens(self) -> int:
        return tokens.count(self._context.prompts[0])

    def _message(self, content: Sequence[object], reason: str | None, usage: Usage) -> dict[str, object]:
        return {
            "id": f"msg_{self._context.id}",
            "type": "message",
            "role": "assistant",
            "content": content,
            "model": self._context.model,
            "stop_reason": reason,
            "stop_sequence": None,
            "usage": _usage(usage),
        }


def _usage(usage: Usage) -> dict[str, int]:
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.output_tokens,
    }


def _event(data: Mapping[str, object]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (str(data["type"]).encode(), msgspec.json.encode(data))
