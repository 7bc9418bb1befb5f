"""What of a request is to become token ids: ids already, texts, or a conversation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Raw

from pointsman.api import vllm_grpc
from pointsman.api.prompts import ABSENT
from pointsman.api.token_ids import prompt_ids, rendered
from pointsman.tokens.conversation import NotText
from pointsman.types import InferenceRequest, Tokenized


class Texts(msgspec.Struct, frozen=True):
    """Prompts as text."""

    texts: tuple[str, ...]
    add_special: bool = True

    def __bool__(self) -> bool:
        return bool(self.texts)


class Chat(msgspec.Struct, frozen=True):
    """A conversation for a chat template."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None
    variables: Mapping[str, Any]
    """What else the template is given."""
    template: str | None = None
    """The request brings its own."""
    add_special: bool = False


Asked = tuple[Tokenized, ...] | Texts | Chat


class _Completion(msgspec.Struct, gc=False):
    prompt: Raw = ABSENT
    add_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    prompt_embeds: Raw = ABSENT


class _Conversation(msgspec.Struct, gc=False):
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    truncate_prompt_tokens: int | None = None


class _SGLang(msgspec.Struct, gc=False):
    text: Raw = ABSENT
    input_ids: Raw = ABSENT
    image_data: Raw = ABSENT
    video_data: Raw = ABSENT
    audio_data: Raw = ABSENT


_completion_of = msgspec.json.Decoder(_Completion).decode
_conversation_of = msgspec.json.Decoder(_Conversation).decode
_sglang_of = msgspec.json.Decoder(_SGLang).decode
_strings = msgspec.json.Decoder(str | list[str]).decode


def asked(request: InferenceRequest) -> Asked:
    """``NotText`` says why there is nothing to tokenise here."""
    if request.tokenized:
        return request.tokenized
    path = request.path.partition("?")[0].rstrip("/")
    read = next((read for suffix, read in _READERS.items() if path.endswith(suffix)), None)
    if read is None:
        raise NotText("format")
    try:
        found = read(request.body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise NotText("malformed") from exc
    if not found:
        raise NotText("malformed")
    return found


def _completion(body: bytes) -> Asked:
    given = _completion_of(body)
    if given.truncate_prompt_tokens is not None or _is_given(given.prompt_embeds):
        raise NotText("truncated")
    return prompt_ids(given.prompt) or Texts(_texts(given.prompt), given.add_special_tokens)


def _is_given(raw: Raw) -> bool:
    return bytes(raw) not in (b"", b"null")


def _texts(raw: Raw) -> tuple[str, ...]:
    found = _strings(raw)
    return (found,) if isinstance(found, str) else tuple(found)


def _chat(body: bytes) -> Asked:
    given = _conversation_of(body)
    if given.truncate_prompt_tokens is not None:
        raise NotText("truncated")
    if not given.messages:
        raise NotText("malformed")
    named = dict(given.chat_template_kwargs or {})
    if given.documents is not None:
        named["documents"] = given.documents
    if given.reasoning_effort is not None:
        named["reasoning_effort"] = given.reasoning_effort
        named.setdefault("enable_thinking", given.reasoning_effort != "none")
    named["add_generation_prompt"] = given.add_generation_prompt
    named["continue_final_message"] = given.continue_final_message
    return Chat(given.messages, given.tools, named, given.chat_template, given.add_special_tokens)


def _vllm(body: bytes) -> Asked:
    return rendered(body)


def _sglang(body: bytes) -> Asked:
    given = _sglang_of(body)
    if any(map(_is_given, (given.image_data, given.video_data, given.audio_data))):
        raise NotText("media")
    return prompt_ids(given.input_ids) or Texts(_texts(given.text))


def _vllm_grpc(body: bytes) -> Asked:
    found = vllm_grpc.tokenized(body)
    if found is None:
        raise NotText("media")
    return Texts((found,)) if isinstance(found, str) else (found,)


_READERS: Mapping[str, Callable[[bytes], Asked]] = {
    "/chat/completions": _chat,
    "/completions": _completion,
    "/inference/v1/generate": _vllm,
    "/generate": _sglang,
    vllm_grpc.GENERATE: _vllm_grpc,
    vllm_grpc.EMBED: _vllm_grpc,
}
