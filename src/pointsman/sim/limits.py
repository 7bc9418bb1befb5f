"""How long an answer becomes, and which requests are too long: vLLM's rules and words."""

from __future__ import annotations

from pointsman.sim import tokens
from pointsman.sim.formats.ask import Ask, Refused


def answer_length(ask: Ask, max_model_len: int, unlimited_tokens: int) -> tuple[int, str]:
    """Tokens of each answer and why it ends there (``length`` or ``stop``); ``Refused`` when it may not be.

    A request that sets no limit gets ``unlimited_tokens``, as if the model had stopped by itself.
    """
    if not ask.prompts or not all(ask.prompts):
        raise Refused(400, "The decoder prompt cannot be empty", param="prompt")
    name, wanted = ask.max_tokens_name, ask.max_tokens
    if wanted is not None and wanted > max_model_len:
        raise Refused(
            400,
            f"{name}={wanted} cannot be greater than max_model_len=max_total_tokens={max_model_len}. "
            f"Please request fewer output tokens. (parameter={name}, value={wanted})",
            param=name,
        )
    if wanted is not None and wanted < ask.generates:
        raise Refused(400, f"{name} must be at least 1, got {wanted}.", param=name)
    prompt_tokens = max(map(tokens.count, ask.prompts))
    limit = ask.default_tokens if wanted is None else wanted
    if prompt_tokens + (limit or ask.generates) > max_model_len:
        raise _too_long(max_model_len, prompt_tokens, limit or 0)
    room = max_model_len - prompt_tokens if limit is None else limit
    told = ask.output_tokens
    if told is None and limit is None:
        told = unlimited_tokens
    if told is None or told >= room or ask.ignore_eos:
        return room, "length"
    return max(1, told), "stop"


def _too_long(max_model_len: int, prompt_tokens: int, output_tokens: int) -> Refused:
    return Refused(
        400,
        f"This model's maximum context length is {max_model_len} tokens. However, you requested "
        f"{output_tokens} output tokens and your prompt contains at least {prompt_tokens} input tokens, for "
        f"a total of at least {prompt_tokens + output_tokens} tokens. Please reduce the length of the input "
        f"prompt or the number of requested output tokens. (parameter=input_tokens, value={prompt_tokens})",
        param="input_tokens",
    )
