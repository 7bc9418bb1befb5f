"""The request formats an EndpointPickerConfig can ask for, by llm-d's names; ``api`` holds the parsers."""

from __future__ import annotations

from typing import ClassVar

from pointsman.registry import Plugin, register


class Parser(Plugin):
    """Names formats of ``pointsman.api``."""

    formats: ClassVar[tuple[str, ...]]


@register("openai-parser")
class OpenAIParser(Parser):
    """OpenAI's API: chat/completions, completions, responses, embeddings and their relatives."""

    formats: ClassVar[tuple[str, ...]] = ("openai",)


@register("anthropic-parser")
class AnthropicParser(Parser):
    """Anthropic's API: messages and messages/count_tokens."""

    formats: ClassVar[tuple[str, ...]] = ("anthropic",)


@register("vllmhttp-parser")
class VLLMParser(Parser):
    """vLLM's /inference/v1/generate, and what openai-parser reads."""

    formats: ClassVar[tuple[str, ...]] = ("vllm", "openai")


@register("vllmgrpc-parser")
class VLLMGrpcParser(Parser):
    """vLLM's gRPC API: Generate and Embed are read; what tells of the engine goes to any endpoint."""

    formats: ClassVar[tuple[str, ...]] = ("vllmgrpc",)


@register("sglanghttp-parser")
class SGLangParser(Parser):
    """SGLang's /generate."""

    formats: ClassVar[tuple[str, ...]] = ("sglang",)


@register("passthrough-parser")
class PassthroughParser(Parser):
    """Any path, nothing read from the body. It takes what no other parser does, so it comes last."""

    formats: ClassVar[tuple[str, ...]] = ("passthrough",)
