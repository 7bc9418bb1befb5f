"""Messages as engines hand them to a chat template, from messages as clients write them.

What vLLM 0.32 does (renderers/chat_utils.py, renderers/hf.py), and SGLang much alike: the parts of a
content become one text unless the template goes through them itself, arguments of tool calls become
objects, fields that no template is given are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

Message = dict[str, Any]


class NotText(Exception):
    """It cannot be made a text here; ``reason`` is a stable word."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def conversation(messages: Sequence[Mapping[str, Any]], *, parts: bool, developer: bool) -> Sequence[Message]:
    """The messages for a template that takes ``parts`` of contents, and knows the role of a ``developer``.

    ``NotText`` with media, or with what is no message.
    """
    try:
        found = [_message(message, parts) for message in messages]
    except (KeyError, TypeError, AttributeError) as exc:
        raise NotText("malformed") from exc
    if not developer and any(message["role"] == "developer" for message in found):
        return _one_system([_as_system(message) for message in found])
    return found


def _message(given: Mapping[str, Any], parts: bool) -> Message:
    role = given["role"]
    content = given.get("content")
    listed = [content] if isinstance(content, str) else content or []
    if role == "system":
        listed = _without_billing(listed)
    texts = [text for text in map(_text, listed) if text is not None]
    message: Message = {"role": role}
    # The results of tools are joined even for templates that take parts: most know them as a text only.
    joined = not parts or role == "tool"
    message["content"] = "\n".join(texts) if joined else [{"type": "text", "text": text} for text in texts]
    if role == "assistant":
        if given.get("tool_calls"):
            message["tool_calls"] = list(map(_tool_call, given["tool_calls"]))
        reasoning = given.get("reasoning")
        if reasoning is None:
            reasoning = given.get("reasoning_content")
        if reasoning is not None:
            message["reasoning"] = message["reasoning_content"] = reasoning
    elif role == "tool" and "tool_call_id" in given:
        message["tool_call_id"] = given["tool_call_id"]
    for key in ("name", "task"):
        if isinstance(given.get(key), str):
            message[key] = given[key]
    if role == "developer":
        message["tools"] = given.get("tools")
    return message


_TEXT_KEYS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}


def _text(part: str | Mapping[str, Any]) -> str | None:
    """What a part says; None where it says nothing."""
    if isinstance(part, str):
        return part
    key = _TEXT_KEYS.get(part["type"])
    if key is None:
        raise NotText("media")
    text = part.get(key)
    if text is not None and not isinstance(text, str):
        raise TypeError
    return text


def has_media(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether some part of a message is no text."""
    contents = (message.get("content") for message in messages)
    return any(
        isinstance(part, dict) and part.get("type") not in _TEXT_KEYS
        for content in contents
        if isinstance(content, list)
        for part in content
    )


_BILLING = "x-anthropic-billing-header"


def _without_billing(parts: Sequence[str | Mapping[str, Any]]) -> list[str | Mapping[str, Any]]:
    """Without Claude Code's billing line, as vLLM drops it: it differs in every call."""
    found: list[str | Mapping[str, Any]] = []
    for part in parts:
        text = _text(part)
        if text is not None and text.startswith(_BILLING):
            text = text.partition("\n")[2]
            if text:
                found.append(text)
        else:
            found.append(part)
    return found


def _tool_call(given: Mapping[str, Any]) -> Message:
    """Its keys in the order in which the engine's schema has them: templates may print all of them."""
    function = given["function"]
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments:
        try:
            arguments = msgspec.json.decode(arguments)
        except msgspec.DecodeError:
            arguments = {}
    called: Message = {"id": given["id"]} if "id" in given else {}
    called["function"] = {
        "arguments": arguments if isinstance(arguments, dict) else {},
        "name": function["name"],
    }
    if "type" in given:
        called["type"] = given["type"]
    return called


def _as_system(message: Message) -> Message:
    if message["role"] != "developer":
        return message
    return {**{key: value for key, value in message.items() if key != "tools"}, "role": "system"}


def _one_system(messages: Sequence[Message]) -> Sequence[Message]:
    """System messages beyond the first place, all of them as one at the head."""
    system = [message for message in messages if message["role"] == "system"]
    if len(system) == 1 and messages[0] is system[0]:
        return messages
    texts = []
    for message in system:
        content = message["content"]
        text = content if isinstance(content, str) else "\n".join(part["text"] for part in content)
        if text:
            texts.append(text)
    others = [message for message in messages if message["role"] != "system"]
    return [{"role": "system", "content": "\n\n".join(texts)}, *others]


def tools(given: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Tools as the engine's schema prints them: what is not given is null, but for two fields."""
    try:
        return [_tool(tool) for tool in given]
    except (KeyError, TypeError, AttributeError) as exc:
        raise NotText("malformed") from exc


def _tool(given: Mapping[str, Any]) -> Message:
    function = given["function"]
    shown: Message = {key: function.get(key) for key in ("name", "description", "parameters")}
    if function.get("strict") is not None:
        shown["strict"] = function["strict"]
    later = given.get("defer_loading")
    deferred = function.get("defer_loading", later)
    if deferred is not None:
        shown["defer_loading"] = deferred
    tool: Message = {"type": "function", "function": shown}
    if later is not None:
        tool["defer_loading"] = later
    return tool
