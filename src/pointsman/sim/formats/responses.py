"""OpenAI's responses. An engine keeps its own, so a call that builds on one must come to the same engine."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

import msgspec
from msgspec import Raw

from pointsman.sim import tokens
from pointsman.sim.formats.ask import (
    ABSENT,
    Ask,
    Choice,
    Context,
    Message,
    Refused,
    Usage,
    read,
    render,
    text_bytes,
)

KEPT = 1_000
"""Responses an engine remembers; the oldest goes."""


class _Asked(msgspec.Struct):
    model: str | None = None
    input: str | list[Message] = ""
    instructions: str | None = None
    tools: Raw = ABSENT
    previous_response_id: str | None = None
    max_output_tokens: int | None = None
    stream: bool | None = False
    store: bool | None = True
    sim_output_tokens: int | None = None


class Responses:
    """The responses of one engine: what was answered, and the conversation that led there."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, tuple[bytes, bytes]] = OrderedDict()

    def get(self, name: str) -> bytes:
        """A stored response as JSON."""
        return self._find(name)[0]

    def delete(self, name: str) -> bytes:
        self._find(name)
        del self._kept[name]
        return msgspec.json.encode({"id": name, "object": "response", "deleted": True})

    def keep(self, name: str, body: bytes, conversation: bytes) -> None:
        self._kept[name] = (body, conversation)
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)

    def ask(self, body: bytes) -> Ask:
        asked = read(body, _Asked)
        so_far = self._find(asked.previous_response_id)[1] if asked.previous_response_id else b""
        return Ask(
            model=asked.model,
            prompts=[so_far + _prompt(asked)],
            reply=partial(Answer, self if asked.store is not False else None, asked.previous_response_id),
            max_tokens=asked.max_output_tokens,
            max_tokens_name="max_output_tokens",
            output_tokens=asked.sim_output_tokens,
            stream=bool(asked.stream),
        )

    def _find(self, name: str) -> tuple[bytes, bytes]:
        found = self._kept.get(name)
        if found is None:
            message = f"Response with id '{name}' not found."
            raise Refused(404, message, "invalid_request_error", "response_id")
        return found


def _prompt(asked: _Asked) -> bytes:
    before = [("tools", bytes(asked.tools)), ("system", (asked.instructions or "").encode())]
    given = [(role, text) for role, text in before if text and text != b"null"]
    if isinstance(asked.input, list):
        return render(asked.input, given)
    return render((), [*given, ("user", text_bytes(asked.input))])


class Answer:
    """The answer of ``/v1/responses``."""

    def __init__(self, responses: Responses | None, previous: str | None, context: Context) -> None:
        self._responses = responses
        self._previous = previous
        self._context = context
        self._id = f"resp_{context.id}"
        self._item = f"msg_{context.id}"
        self._sequence = 0
        self._delta = b'"item_id":%b,"output_index":0,"content_index":0,"logprobs":[]' % msgspec.json.encode(
            self._item
        )

    def opening(self) -> Sequence[bytes]:
        empty = self._response("in_progress", [], None, None)
        item = self._message("in_progress", [])
        return (
            self._event("response.created", response=empty),
            self._event("response.in_progress", response=empty),
            self._event("response.output_item.added", output_index=0, item=item),
            self._event("response.content_part.added", **self._place(), part=_text(b"")),
        )

    def piece(self, index: int, text: bytes, reason: str | None) -> bytes:
        self._sequence += 1
        return (
            b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta",'
            b'"sequence_number":%d,%b,"delta":"%b"}\n\n' % (self._sequence - 1, self._delta, text)
        )

    def closing(self, choices: Sequence[Choice], usage: Usage) -> Sequence[bytes]:
        text = choices[0].text
        response = self._finished(choices[0], usage)
        kind = "response.completed" if response["status"] == "completed" else "response.incomplete"
        message = self._message("completed", [_text(text)])
        return (
            self._event("response.output_text.done", **self._place(), text=text.decode(), logprobs=[]),
            self._event("response.content_part.done", **self._place(), part=_text(text)),
            self._event("response.output_item.done", output_index=0, item=message),
            self._event(kind, response=response),
        )

    def whole(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        return msgspec.json.encode(self._finished(choices[0], usage))

    def _finished(self, choice: Choice, usage: Usage) -> dict[str, object]:
        status = "completed" if choice.reason == "stop" else "incomplete"
        details = None if choice.reason == "stop" else {"reason": "max_output_tokens"}
        response = self._response(status, [self._message(status, [_text(choice.text)])], details, usage)
        if self._responses is not None:
            conversation = tokens.filled(self._context.prompts[0]) + choice.text
            self._responses.keep(self._id, msgspec.json.encode(response), conversation)
        return response

    def _response(
        self, status: str, output: Sequence[object], details: object, usage: Usage | None
    ) -> dict[str, object]:
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._context.created_s,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": details,
            "instructions": None,
            "metadata": {},
            "model": self._context.model,
            "output": output,
            "parallel_tool_calls": True,
            "previous_response_id": self._previous,
            "temperature": 1.0,
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0,
            "usage": usage and _usage(usage),
        }

    def _message(self, status: str, content: Sequence[object]) -> dict[str, object]:
        return {
            "id": self._item,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": content,
        }

    def _place(self) -> dict[str, object]:
        return {"item_id": self._item, "output_index": 0, "content_index": 0}

    def _event(self, kind: str, **fields: object) -> bytes:
        data = {"type": kind, "sequence_number": self._sequence} | fields
        self._sequence += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), msgspec.json.encode(data))


def _text(text: bytes) -> dict[str, object]:
    return {"type": "output_text", "text": text.decode(), "annotations": [], "logprobs": []}


def _usage(usage: Usage) -> dict[str, object]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.output_tokens,
        "output_tokens_details": {"reasoning_tokens": 0, "tool_output_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.output_tokens,
    }
