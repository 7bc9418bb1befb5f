"""The prompts of a request as token ids, or why there are none."""

from __future__ import annotations

import msgspec
from msgspec.structs import replace

from pointsman.types import InferenceRequest, Tokenized


class Found(msgspec.Struct, frozen=True, gc=False):
    """``prompts`` in the request's order; empty, and then ``reason`` is a stable word, where they are not
    known.

    Reasons: ``late`` (not within ``tokens.budget_s``), ``busy`` (too many are waiting), ``media``,
    ``template`` (the model has none, it failed, or the request brought its own), ``truncated``, ``format``
    (of the request), ``malformed``, ``refused`` (the engine says so), ``failed`` (it did not answer well),
    ``nobody`` (there is no tokenizer here and no engine that tokenises).
    """

    prompts: tuple[Tokenized, ...] = ()
    source: str = ""
    """``given``, ``here``, ``render`` or ``tokenize``."""
    reason: str = ""

    def added_to(self, request: InferenceRequest) -> InferenceRequest:
        """The request with its ids, and its prompt tokens counted rather than estimated."""
        if not self.prompts:
            return request
        count = sum(prompt.count for prompt in self.prompts)
        return replace(request, tokenized=self.prompts, prompt_tokens=count)
