"""Rerank (Cohere's and Jina's shape) and vLLM's score: texts judged in pairs.

The models behind them are mostly encoders without a KV cache to hit, so there is no prompt to match; what
they have to read is counted, since it is what they cost.
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Raw

from pointsman.api.body import Body, Facts, json_parser
from pointsman.api.format import Format, register
from pointsman.api.prompts import ABSENT, prompts, tokens


class _Pairs(Body):
    query: Raw = ABSENT
    queries: Raw = ABSENT
    documents: Raw = ABSENT
    items: Raw = ABSENT
    text_1: Raw = ABSENT
    text_2: Raw = ABSENT
    data_1: Raw = ABSENT
    data_2: Raw = ABSENT


def _pairs(body: _Pairs, headers: Mapping[str, str]) -> Facts:
    """One query is read again with every document; many queries are read with one document each."""
    left = _first(body.query, body.queries, body.text_1, body.data_1)
    right = _first(body.documents, body.items, body.text_2, body.data_2)
    queries, documents = prompts(left), prompts(right)
    again = len(documents) if len(queries) == 1 else 1
    return Facts(prompt_tokens=tokens(queries) * again + tokens(documents))


def _first(*given: Raw) -> Raw:
    return next((raw for raw in given if raw is not ABSENT), ABSENT)


register(
    Format("rerank", ("/rerank",), json_parser("rerank", _Pairs, _pairs, needs_model=False)),
    Format("vllm", ("/score",), json_parser("vllm", _Pairs, _pairs, needs_model=False)),
)
