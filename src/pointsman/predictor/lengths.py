"""How long answers get: means of what came back, by model and by the limit the request sets."""

from __future__ import annotations

from pointsman.types import InferenceRequest

MEMORY = 4000
"""Answers that count; then each counts for half."""
DEFAULT_TOKENS = 300.0
MAX_KEYS = 4096


class Length:
    """Of the answers to one sort of request, in tokens."""

    __slots__ = ("_answers", "_squares", "_tokens")

    def __init__(self, like: Length | None = None) -> None:
        self._answers = 1.0
        self._tokens = like.mean if like else DEFAULT_TOKENS
        self._squares = like.of_a_token * like.mean if like else DEFAULT_TOKENS * DEFAULT_TOKENS

    @property
    def mean(self) -> float:
        return self._tokens / self._answers

    @property
    def of_a_token(self) -> float:
        """Mean length of the answer that a token belongs to: what is running is more often long."""
        return self._squares / self._tokens

    def add(self, tokens: float) -> None:
        self._answers += 1.0
        self._tokens += tokens
        self._squares += tokens * tokens
        if self._answers > MEMORY:
            self._answers /= 2
            self._tokens /= 2
            self._squares /= 2


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
