"""OpenAI's completions, chat completions, embeddings and images; vLLM's pooling calls have the same shape."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Raw

from pointsman.api import media
from pointsman.api.body import Body, Count, Facts, json_parser
from pointsman.api.format import Format, register
from pointsman.api.prompts import ABSENT, opened, prompt, prompts, root, text, tokens
from pointsman.api.token_ids import rendered
from pointsman.types import Prompt


class _Completion(Body):
    prompt: Raw = ABSENT
    max_tokens: Count | None = None
    n: Count | None = None
    cache_salt: Raw = ABSENT


class _Chat(Body):
    messages: Raw = ABSENT
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    n: Count | None = None
    cache_salt: Raw = ABSENT
    tools: Raw = ABSENT
    chat_template: Raw = ABSENT
    chat_template_kwargs: Raw = ABSENT
    documents: Raw = ABSENT
    reasoning_effort: Raw = ABSENT
    tokens: Raw = ABSENT
    """llm-d's: the conversation as token ids, for the router."""


class _Input(Body):
    """Embeddings, and vLLM's pooling calls, which also take a chat."""

    input: Raw = ABSENT
    messages: Raw = ABSENT
    cache_salt: Raw = ABSENT


class _Image(Body):
    prompt: Raw = ABSENT
    n: Count | None = None


def chat_prompt(messages: Raw, headers: Mapping[str, str]) -> tuple[tuple[Prompt, ...], media.Media]:
    """A conversation as one prompt, its media replaced by their hashes."""
    written = bytes(messages)
    if written[:1] != b"[":
        return (), ()
    if not media.possible(written):
        return (prompt(opened(written)),), ()
    condensed, found = media.condense(written, headers)
    return (prompt(opened(condensed if found else written)),), found


def _completion(body: _Completion, headers: Mapping[str, str]) -> Facts:
    batch = prompts(body.prompt)
    salt = text(body.cache_salt)
    return Facts(batch, tokens(batch), root(body.cache_salt), body.max_tokens, body.n or 1, cache_salt=salt)


def _chat(body: _Chat, headers: Mapping[str, str]) -> Facts:
    batch, found = chat_prompt(body.messages, headers)
    before = root(
        body.cache_salt,
        body.tools,
        body.chat_template,
        body.chat_template_kwargs,
        body.documents,
        body.reasoning_effort,
    )
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    facts = Facts(batch, tokens(batch), before, limit, body.n or 1, found, cache_salt=text(body.cache_salt))
    if body.tokens is not ABSENT:
        facts.ours, facts.tokenized = "tokens", rendered(body.tokens)
        if facts.tokenized:
            facts.prompt_tokens = facts.tokenized[0].count
    return facts


def _input(body: _Input, headers: Mapping[str, str]) -> Facts:
    batch, found = chat_prompt(body.messages, headers)
    batch = batch or prompts(body.input)
    return Facts(batch, tokens(batch), root(body.cache_salt), media=found, cache_salt=text(body.cache_salt))


def _image(body: _Image, headers: Mapping[str, str]) -> Facts:
    batch = prompts(body.prompt)
    return Facts(batch, tokens(batch), n=body.n or 1)


register(
    Format(
        "openai", ("/completions", "/completions/render"), json_parser("openai", _Completion, _completion)
    ),
    Format("openai", ("/chat/completions", "/chat/completions/render"), json_parser("openai", _Chat, _chat)),
    Format("openai", ("/embeddings",), json_parser("openai", _Input, _input)),
    Format("openai", ("/images/generations",), json_parser("openai", _Image, _image)),
    Format("vllm", ("/classify", "/pooling"), json_parser("vllm", _Input, _input, needs_model=False)),
)
