"""Block hashes of a prompt: xxh64 over each block, seeded with the hash of everything before it.

Equal hashes at position i mean equal model, root and first i+1 blocks. Blocks are bytes as the client wrote
them, ``block_bytes`` long; a shorter last block counts as a block of its own.
"""

from __future__ import annotations

from xxhash import xxh64_intdigest

from pointsman.types import InferenceRequest


def block_hashes(request: InferenceRequest, block_bytes: int, max_blocks: int) -> list[list[int]]:
    """One hash chain for each prompt of the request, at most ``max_blocks`` long; empty prompts are left
    out.
    """
    seed = xxh64_intdigest(request.root, xxh64_intdigest(request.model.encode()))
    chains = []
    for prompt in request.prompts:
        data = memoryview(prompt.data)
        previous = seed
        chain = []
        for at in range(0, min(len(data), max_blocks * block_bytes), block_bytes):
            previous = xxh64_intdigest(data[at : at + block_bytes], previous)
            chain.append(previous)
        if chain:
            chains.append(chain)
    return chains
