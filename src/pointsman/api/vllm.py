"""vLLM's own calls: generation from token ids, and its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from msgspec import Raw

from pointsman.api.body import Body, Count, Facts, json_parser
from pointsman.api.format import Format, register
from pointsman.api.prompts import ABSENT, prompts, root, text, tokens


class _Sampling(msgspec.Struct, gc=False):
    max_tokens: Count | None = None
    n: Count | None = None


class _Features(msgspec.Struct, gc=False):
    mm_hashes: Raw = ABSENT


class _Generate(Body):
    token_ids: Raw = ABSENT
    features: _Features | None = None
    sampling_params: _Sampling | None = None
    cache_salt: Raw = ABSENT


def _generate(body: _Generate, headers: Mapping[str, str]) -> Facts:
    """Placeholders of media are in the ids already, which media they stand for is not: the root has it."""
    batch = prompts(body.token_ids)[:1]
    sampling = body.sampling_params or _Sampling()
    before = root(body.cache_salt, body.features.mm_hashes if body.features else ABSENT)
    salt = text(body.cache_salt)
    return Facts(batch, tokens(batch), before, sampling.max_tokens, sampling.n or 1, cache_salt=salt)


def _nothing(body: Body, headers: Mapping[str, str]) -> Facts:
    """Only its model matters: another model's tokenizer would give another answer."""
    return Facts()


register(
    Format("vllm", ("/inference/v1/generate",), json_parser("vllm", _Generate, _generate, needs_model=False)),
    Format("vllm", ("/tokenize", "/detokenize"), json_parser("vllm", Body, _nothing, needs_model=False)),
)
