"""Calls as the router and the engines see them, each prompt made once however often it comes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import msgspec
from xxhash import xxh64_intdigest

from pointsman import api
from pointsman.api import prompts
from pointsman.bench.workloads import Call
from pointsman.sim import tokens
from pointsman.types import InferenceRequest, Prompt, Tokenized

PATH = "/v1/completions"
_FORMAT = api.find(PATH).name
KEPT_BYTES = 512 << 20
_HASH_BYTES = 40


class Prepared:
    """One prompt: its bytes, and its engine blocks for each block size somebody asked for."""

    __slots__ = ("_chains", "_hasher", "_seed", "data", "prompt", "root", "tokens")

    def __init__(self, call: Call, model: str, hasher: tokens.BlockHasher) -> None:
        self.data = data = call.prompt.encode()
        self.tokens = tokens.count(data)
        self.prompt: tuple[Prompt, ...] = (prompts.prompt(data),)
        salt = call.cache_salt
        self.root = prompts.root(msgspec.Raw(msgspec.json.encode(salt))) if salt else prompts.root()
        self._seed = xxh64_intdigest(salt.encode(), xxh64_intdigest(model.encode()))
        self._hasher = hasher
        self._chains: dict[int, Sequence[int]] = {}

    def blocks(self, block_tokens: int) -> Sequence[int]:
        """Hashes of its full blocks of that size."""
        found = self._chains.get(block_tokens)
        if found is None:
            found = self._chains[block_tokens] = self._hasher.hash(self.data, block_tokens, self._seed)
        return found

    def continued(self, answer: str, block_tokens: int, kv_tokens: int) -> Sequence[int]:
        """Hashes of the full blocks behind the prompt's when ``kv_tokens`` are in the KV cache."""
        output = answer.encode()[: (kv_tokens - self.tokens) * tokens.TOKEN_BYTES]
        return tokens.continued_hashes(self.data, self.blocks(block_tokens), output, block_tokens, self._seed)


class Prompts:
    """Keeps the prompts used last, ``KEPT_BYTES`` of them."""

    def __init__(self, model: str, *, tokenized: bool = False) -> None:
        """``tokenized``: requests carry the token ids of their prompts."""
        self.model = model
        self._tokenized = tokenized
        self._hasher = tokens.BlockHasher()
        self._kept: OrderedDict[tuple[str, str, str], Prepared] = OrderedDict()
        self._bytes = 0

    def prepare(self, call: Call) -> Prepared:
        """The call's prompt, ready for router and engines."""
        key = (call.prompt, call.model, call.cache_salt)
        found = self._kept.get(key)
        if found is not None:
            if call.then is None:
                self._kept.move_to_end(key)
            return found
        prepared = Prepared(call, call.model, self._hasher)
        if call.then is None:  # a conversation's prompt does not come again
            self._kept[key] = prepared
            self._bytes += _size(prepared)
            while self._bytes > KEPT_BYTES:
                self._bytes -= _size(self._kept.popitem(last=False)[1])
        return prepared

    def request(self, number: int, call: Call, prepared: Prepared) -> InferenceRequest:
        """What the gateway's parser would make of this call sent as a streamed completion."""
        return InferenceRequest(
            id=f"{number:08x}",
            path=PATH,
            format=_FORMAT,
            model=call.model or self.model,
            stream=True,
            prompts=prepared.prompt,
            root=prepared.root,
            tokenized=(Tokenized(tokens.filled(prepared.data)),) if self._tokenized else (),
            cache_salt=call.cache_salt,
            prompt_tokens=prepared.prompt[0].tokens,
            max_tokens=call.max_tokens,
            headers=dict(call.headers),
        )


def _size(prepared: Prepared) -> int:
    return 2 * len(prepared.data) + len(prepared.data) // 64 * _HASH_BYTES
