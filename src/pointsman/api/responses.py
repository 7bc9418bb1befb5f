"""OpenAI's Responses API and the calls about what it and its relatives store: they go where it is stored."""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec
from msgspec import Raw

from pointsman.api import replies
from pointsman.api.body import Body, Count, Facts, compressed, json_parser, reader
from pointsman.api.format import Format, passthrough, register
from pointsman.api.openai import chat_prompt
from pointsman.api.prompts import ABSENT, prompt, prompts, root, text, tokens
from pointsman.types import InferenceRequest


class _Conversation(msgspec.Struct, gc=False):
    id: str = ""


class _Response(Body):
    input: Raw = ABSENT
    instructions: Raw = ABSENT
    previous_response_id: str | None = None
    conversation: str | _Conversation | None = None
    max_output_tokens: Count | None = None
    cache_salt: Raw = ABSENT
    tools: Raw = ABSENT
    prompt: Raw = ABSENT
    reasoning: Raw = ABSENT


def _response(body: _Response, headers: Mapping[str, str]) -> Facts:
    """Instructions, then input. After earlier state the same input is another prompt: its id is in the
    root.
    """
    batch, found = chat_prompt(body.input, headers)
    if not batch:
        batch = prompts(body.input)
    head = bytes(body.instructions)
    if head[:1] == b'"' and batch:
        batch = (prompt(b"".join((head, batch[0].data))),)
    state = body.previous_response_id or ""
    if not state and body.conversation is not None:
        conversation = body.conversation
        state = conversation if isinstance(conversation, str) else conversation.id
    before = root(
        body.cache_salt, body.tools, body.prompt, body.reasoning, Raw(state.encode()) if state else ABSENT
    )
    return Facts(
        batch,
        tokens(batch),
        before,
        body.max_output_tokens,
        media=found,
        state_id=state,
        cache_salt=text(body.cache_salt),
    )


class _Stored(Body):
    input_file_id: str | None = None


_OBJECT = re.compile(r"/v1/(?:responses|conversations|files|batches)/([^/?]+)")
_stored = reader(_Stored)


def _state(request_id: str, path: str, headers: Mapping[str, str], body: bytes) -> InferenceRequest:
    """Calls on a stored object by the id in their path; a batch by the file it reads."""
    found = _OBJECT.search(path)
    state = found[1] if found else ""
    if not state and path.partition("?")[0].endswith("/batches") and body and not compressed(headers):
        state = _stored(body).input_file_id or ""
    plain = passthrough(request_id, path, headers, body)
    return msgspec.structs.replace(plain, format="openai", state_id=state)


_COLLECTION = re.compile(r"/v1/(?:responses|conversations|files|batches)/?(?:\?|$)")
_ID = re.compile(rb'"id"\s*:\s*"([^"\\]{1,256})"')


def makes_state(path: str) -> bool:
    """Whether a POST to ``path`` makes something that later calls name."""
    return _COLLECTION.search(path) is not None


def created_id(path: str, head: bytes) -> str:
    """The id of what a POST to ``path`` created, out of the response's first bytes; empty where it created
    none.

    A response, streamed or not, names its own id before any other.
    """
    found = _ID.search(head) if _COLLECTION.search(path) else None
    return found[1].decode(errors="replace") if found else ""


register(
    Format(
        "openai",
        ("/responses", "/responses/render", "/responses/input_tokens", "/responses/compact"),
        json_parser("openai", _Response, _response),
        stream_error=replies.responses_stream_error,
    ),
    Format("openai", ("/v1/conversations", "/v1/files", "/v1/batches"), _state, pattern=_OBJECT),
)
