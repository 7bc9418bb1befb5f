"""OpenAI's completions, chat completions and embeddings, written as vLLM 0.32.0 writes them."""

from __future__ import annotations

import base64
from array import array
from collections.abc import Sequence
from functools import partial

import msgspec
from msgspec import Raw
from xxhash import xxh64_digest

from pointsman.sim import tokens
from pointsman.sim.formats.ask import (
    ABSENT,
    Ask,
    Choice,
    Context,
    Message,
    Usage,
    prompt_list,
    read,
    render,
    token_ids,
)

DONE = b"data: [DONE]\n\n"
COMPLETION_TOKENS = 16
"""``max_tokens`` of a completion that does not set it."""
DIMENSIONS = 64


class _StreamOptions(msgspec.Struct):
    include_usage: bool = False


class _Generate(msgspec.Struct):
    model: str | None = None
    prompt: object = None
    messages: list[Message] | None = None
    tools: Raw = ABSENT
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = None
    stream: bool | None = False
    stream_options: _StreamOptions | None = None
    ignore_eos: bool = False
    return_token_ids: bool | None = None
    cache_salt: str | None = None
    sim_output_tokens: int | None = None

    def ask(self, prompts: Sequence[bytes], reply: type[Completion] | type[Chat]) -> Ask:
        limit = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        include_usage = self.stream_options is not None and self.stream_options.include_usage
        return Ask(
            model=self.model,
            prompts=prompts,
            reply=partial(reply, include_usage=include_usage, ids=bool(self.return_token_ids), n=self.n or 1),
            max_tokens=self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens,
            max_tokens_name=limit,
            output_tokens=self.sim_output_tokens,
            stream=bool(self.stream),
            choices=self.n or 1,
            salt=self.cache_salt or "",
            ignore_eos=self.ignore_eos,
        )


def completions(body: bytes) -> Ask:
    asked = read(body, _Generate)
    ask = asked.ask(prompt_list(asked.prompt), Completion)
    ask.default_tokens = COMPLETION_TOKENS
    return ask


def chat(body: bytes) -> Ask:
    asked = read(body, _Generate)
    return asked.ask([_chat_prompt(asked.messages or (), asked.tools)], Chat)


def _chat_prompt(messages: Sequence[Message], tools: Raw) -> bytes:
    return render(messages, [("tools", bytes(tools))] if bytes(tools) not in (b"", b"null") else [])


class Completion:
    """The answer of ``/v1/completions``."""

    def __init__(self, context: Context, *, include_usage: bool, ids: bool, n: int) -> None:
        self._context = context
        self._include_usage = include_usage
        self._ids = ids
        self._n = n
        self._head = _head(f"cmpl-{context.id}", "text_completion", context)
        self._told: set[int] = set()

    def opening(self) -> Sequence[bytes]:
        return ()

    def piece(self, index: int, text: bytes, reason: str | None) -> bytes:
        return (
            b'data: %b[{"index":%d,"text":"%b","logprobs":null,"finish_reason":%b,"stop_reason":null%b}]}\n\n'
            % (
                self._head,
                index,
                text,
                b'"%b"' % reason.encode() if reason else b"null",
                self._token_ids(index, text) if self._ids else b"",
            )
        )

    def closing(self, choices: Sequence[Choice], usage: Usage) -> Sequence[bytes]:
        if not self._include_usage:
            return (DONE,)
        return b'data: %b[],"usage":%b}\n\n' % (self._head, msgspec.json.encode(usage.openai())), DONE

    def whole(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        written = [
            b'{"index":%d,"text":"%b","logprobs":null,"finish_reason":"%b","stop_reason":null%b}'
            % (c.index, c.text, c.reason.encode(), self._token_ids(c.index, c.text) if self._ids else b"")
            for c in choices
        ]
        return _whole(self._head, written, usage, b"")

    def _token_ids(self, index: int, text: bytes) -> bytes:
        """Those of the text; those of the prompt too, the first time."""
        prompt = b"null"
        if index not in self._told:
            self._told.add(index)
            prompt = token_ids(self._context.prompts[index // self._n])
        return b',"prompt_token_ids":%b,"token_ids":%b' % (prompt, token_ids(text))


class Chat:
    """The answer of ``/v1/chat/completions``."""

    def __init__(self, context: Context, *, include_usage: bool, ids: bool, n: int) -> None:
        self._context = context
        self._include_usage = include_usage
        self._ids = ids
        self._n = n
        self._id = f"chatcmpl-{context.id}"
        self._head = _head(self._id, "chat.completion.chunk", context)

    def opening(self) -> Sequence[bytes]:
        ids = b',"prompt_token_ids":%b' % self._prompt_ids() if self._ids else b""
        return [
            b'data: %b[{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,'
            b'"finish_reason":null}]%b}\n\n' % (self._head, index, ids)
            for index in range(self._n)
        ]

    def piece(self, index: int, text: bytes, reason: str | None) -> bytes:
        if reason is None and not self._ids:
            return (
                b'data: %b[{"index":%d,"delta":{"content":"%b"},"logprobs":null,"finish_reason":null}]}\n\n'
                % (
                    self._head,
                    index,
                    text,
                )
            )
        return (
            b'data: %b[{"index":%d,"delta":{"content":"%b"},"logprobs":null,"finish_reason":%b%b}]}\n\n'
            % (
                self._head,
                index,
                text,
                b'"%b","stop_reason":null' % reason.encode() if reason else b"null",
                b',"token_ids":%b' % token_ids(text) if self._ids else b"",
            )
        )

    def closing(self, choices: Sequence[Choice], usage: Usage) -> Sequence[bytes]:
        if not self._include_usage:
            return (DONE,)
        return b'data: %b[],"usage":%b}\n\n' % (self._head, msgspec.json.encode(usage.openai())), DONE

    def whole(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        written = [
            b'{"index":%d,"message":{"role":"assistant","content":"%b","refusal":null,"annotations":null,'
            b'"audio":null,"function_call":null,"tool_calls":[],"reasoning":null},"logprobs":null,'
            b'"finish_reason":"%b","stop_reason":null,"token_ids":%b}'
            % (c.index, c.text, c.reason.encode(), token_ids(c.text) if self._ids else b"null")
            for c in choices
        ]
        head = _head(self._id, "chat.completion", self._context)
        ids = self._prompt_ids() if self._ids else b"null"
        return _whole(head, written, usage, b',"prompt_token_ids":%b' % ids)

    def _prompt_ids(self) -> bytes:
        return token_ids(self._context.prompts[0])


def _head(name: str, kind: str, context: Context) -> bytes:
    """An object's members up to its choices."""
    return b'{"id":%b,"object":"%b","created":%d,"model":%b,"choices":' % (
        msgspec.json.encode(name),
        kind.encode(),
        context.created_s,
        msgspec.json.encode(context.model),
    )


def _whole(head: bytes, choices: Sequence[bytes], usage: Usage, more: bytes) -> bytes:
    counts = usage.openai()
    counts["prompt_tokens_details"] = {
        "cached_tokens": usage.cached_tokens,
        "created_cache_tokens": None,
        "multimodal_tokens": None,
    }
    return b'%b[%b],"service_tier":null,"system_fingerprint":null,"usage":%b%b,"kv_transfer_params":null}' % (
        head,
        b",".join(choices),
        msgspec.json.encode(counts),
        more,
    )


class _Embed(msgspec.Struct):
    model: str | None = None
    input: object = None
    encoding_format: str | None = "float"
    dimensions: int | None = None
    cache_salt: str | None = None


def embeddings(body: bytes) -> Ask:
    asked = read(body, _Embed)
    packed = asked.encoding_format == "base64"
    return Ask(
        model=asked.model,
        prompts=prompt_list(asked.input, "input"),
        reply=partial(Embeddings, packed=packed, dimensions=asked.dimensions or DIMENSIONS),
        max_tokens=0,
        generates=False,
        salt=asked.cache_salt or "",
    )


class Embeddings:
    """The answer of ``/v1/embeddings``."""

    def __init__(self, context: Context, *, packed: bool, dimensions: int) -> None:
        self._context = context
        self._packed = packed
        self._dimensions = dimensions

    def opening(self) -> Sequence[bytes]:
        return ()

    def piece(self, index: int, text: bytes, reason: str | None) -> bytes:
        return b""

    def closing(self, choices: Sequence[Choice], usage: Usage) -> Sequence[bytes]:
        return ()

    def whole(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        vectors = [_vector(prompt, self._dimensions) for prompt in self._context.prompts]
        data = [
            {
                "index": i,
                "object": "embedding",
                "embedding": base64.b64encode(v.tobytes()).decode() if self._packed else v.tolist(),
            }
            for i, v in enumerate(vectors)
        ]
        answer = {
            "id": f"embd-{self._context.id}",
            "object": "list",
            "created": self._context.created_s,
            "model": self._context.model,
            "data": data,
            "usage": usage.openai(),
        }
        return msgspec.json.encode(answer)


def _vector(text: bytes, dimensions: int) -> array[float]:
    """Numbers in [-1, 1) that depend on the text alone."""
    digest = b"".join(xxh64_digest(text, seed) for seed in range(dimensions // 8 + 1))
    return array("f", [byte / 128 - 1 for byte in digest[:dimensions]])


def tokenize(body: bytes) -> tuple[bytes, bool]:
    """The text a ``/tokenize`` request speaks of, and whether token texts are wanted."""
    asked = read(body, _Tokenize)
    if asked.messages is not None:
        return _chat_prompt(asked.messages, asked.tools), asked.return_token_strs
    return prompt_list(asked.prompt)[0], asked.return_token_strs


class _Tokenize(msgspec.Struct):
    prompt: object = None
    messages: list[Message] | None = None
    tools: Raw = ABSENT
    return_token_strs: bool = False


class _Detokenize(msgspec.Struct):
    tokens: list[int]


def detokenize(body: bytes) -> str:
    """The text of a ``/detokenize`` request's tokens."""
    return tokens.text_of(prompt_list(read(body, _Detokenize).tokens, "tokens")[0])
