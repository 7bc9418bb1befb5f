"""A prompt and the answer behind it, as the blocks of a simulated engine have them."""

from __future__ import annotations

from collections.abc import Callable

from pointsman.sim.tokens import TOKEN_BYTES, filled


class Text:
    """One sequence (``sequence.Content``). ``answer`` gives the first so many tokens of the answer."""

    __slots__ = ("_answer", "_block_bytes", "_prompt", "lora", "salt")

    def __init__(
        self, prompt: bytes, answer: Callable[[int], bytes], block_tokens: int, lora: str, salt: str
    ) -> None:
        self._prompt = prompt
        self._answer = answer
        self._block_bytes = block_tokens * TOKEN_BYTES
        self.lora = lora
        self.salt = salt

    def token_ids(self, first: int, blocks: int) -> bytes:
        begin, end = first * self._block_bytes, (first + blocks) * self._block_bytes
        text = self._prompt
        if end > len(text):
            text = filled(text)
            text += self._answer((end - len(text)) // TOKEN_BYTES)
        return text[begin:end]
