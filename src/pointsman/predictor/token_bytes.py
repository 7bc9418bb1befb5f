"""How many bytes of prompt text a model's tokenizer makes a token of, learned from what engines report."""

from __future__ import annotations

from math import ceil

from msgspec.structs import replace

from pointsman.types import BYTES_PER_TOKEN, Ending, InferenceRequest, Outcome

LEAST, MOST = 1.0, 16.0
"""Nothing outside is believed."""
PRIOR_TOKENS = 1_000
"""What is assumed of a model weighs as much as so many tokens that were seen."""
MEMORY_TOKENS = 200_000
"""After so many more, what was seen counts for half."""
KNOWN_TOKENS = 50_000
ONE_OF = 16
"""A model is known well after so many tokens; then one request of so many is read, and counts for all."""
NEAR = 0.02
"""Closer than this to what is assumed anyway is not worth a correction."""
MAX_MODELS = 4096


class TokenBytes:
    """Bytes per prompt token by model. What is asked for every request is one lookup in ``by_model``."""

    def __init__(self) -> None:
        self.by_model: dict[str, float] = {}
        """Models whose prompts are corrected; of all others a token is ``BYTES_PER_TOKEN``."""
        self._skipped = 0
        self._seen: dict[str, tuple[float, float]] = {}
        """Bytes and tokens by model."""

    def corrected(self, request: InferenceRequest) -> InferenceRequest:
        """The request with its prompt tokens as its model's earlier prompts suggest. Its prompts stay as they
        are, and with them the prefix blocks, which are bytes.
        """
        token_bytes = self.by_model.get(request.model)
        if token_bytes is None or request.tokenized:
            return request
        text = _text_bytes(request)
        return replace(request, prompt_tokens=ceil(text / token_bytes)) if text else request

    def learn(self, request: InferenceRequest, outcome: Outcome) -> None:
        """The request is over; only one that ended well and told its prompt's tokens says something. Of a
        model that is known well few are looked at.
        """
        tokens = outcome.usage.prompt_tokens
        if not tokens or outcome.ending is not Ending.OK:
            return
        model = request.model
        before = self._seen.get(model)
        times = 1
        if before is not None and before[1] > KNOWN_TOKENS:
            self._skipped += 1
            if self._skipped % ONE_OF:
                return
            times = ONE_OF
        text = _text_bytes(request)
        if not text:
            return
        if before is None:
            if len(self._seen) >= MAX_MODELS:
                return
            before = PRIOR_TOKENS * BYTES_PER_TOKEN, PRIOR_TOKENS
        kept = 0.5 ** (times * tokens / MEMORY_TOKENS)
        seen_bytes, seen_tokens = before[0] * kept + times * text, before[1] * kept + times * tokens
        self._seen[model] = seen_bytes, seen_tokens
        token_bytes = min(MOST, max(LEAST, seen_bytes / seen_tokens))
        if abs(token_bytes / BYTES_PER_TOKEN - 1) < NEAR:
            self.by_model.pop(model, None)
        else:
            self.by_model[model] = token_bytes


def _text_bytes(request: InferenceRequest) -> int:
    """Bytes of the prompts when all are text; 0 with media, or token ids, whose number is known."""
    if request.media:
        return 0
    total = 0
    for prompt in request.prompts:
        size = prompt.size
        if (size + BYTES_PER_TOKEN - 1) // BYTES_PER_TOKEN != prompt.tokens:
            return 0
        total += size
    return total
