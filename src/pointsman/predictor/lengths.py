"""How long answers get: means of what came back, by model and by the limit the request sets."""

from __future__ import annotations

from pointsman.types import InferenceRequest

MEMORY = 2000
"""Answers that count."""
DEFAULT_TOKENS = 300.0
MAX_KEYS = 4096


class Length:
    """Of the answers to one sort of request, in tokens."""

    __slots__ = ("_answers", "_square", "mean")

    def __init__(self, like: Length | None = None) -> None:
        self._answers = 1
        self.mean: float = like.mean if like else DEFAULT_TOKENS
        self._square: float = like._square if like else DEFAULT_TOKENS * DEFAULT_TOKENS

    @property
    def of_a_token(self) -> float:
        """Mean length of the answer that a token belongs to: what is running is more often long."""
        return self._square / self.mean

    def add(self, tokens: float) -> None:
        self._answers = min(self._answers + 1, MEMORY)
        share = 1 / self._answers
        self.mean += (tokens - self.mean) * share
        self._square += (tokens * tokens - self._square) * share


class Lengths:
    """Knows the usual length of an answer, the better the more came back."""

    def __init__(self) -> None:
        self.pool = Length()
        self._by_key: dict[tuple[str, int], Length] = {}

    def of(self, request: InferenceRequest) -> Length:
        """What to expect of this request."""
        return self._by_key.get(_key(request), self.pool)

    def add(self, request: InferenceRequest, tokens: int) -> None:
        """An answer to ``request`` has ended well after ``tokens``."""
        self.pool.add(tokens)
        key = _key(request)
        found = self._by_key.get(key)
        if found is None:
            if len(self._by_key) >= MAX_KEYS:
                return
            found = self._by_key[key] = Length(self.pool)
        found.add(tokens)


def _key(request: InferenceRequest) -> tuple[str, int]:
    limit = request.max_tokens
    return request.model, limit.bit_length() if limit else 0
