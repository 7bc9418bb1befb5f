"""The prefix index equals a plain model: an ordered list of blocks per endpoint, matches found by walking."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pointsman.prefix.approximate import PrefixIndex
from pointsman.testing import request
from pointsman.types import InferenceRequest, Prompt

BLOCK = 64
NAMES = (0, 1, 2, 3, 4, 5, 6, 40)
SLOTS = st.sampled_from(NAMES)
TEXTS = st.text("ab", min_size=1, max_size=7)
"""A letter stands for one block, so that prompts often share prefixes."""

Block = tuple[str, ...]


def ask(texts: list[str]) -> InferenceRequest:
    prompts = tuple(Prompt(("".join(c * BLOCK * 4 for c in t)).encode(), BLOCK * len(t)) for t in texts)
    return request(prompts=prompts, prompt_tokens=sum(p.tokens for p in prompts))


def blocks(text: str) -> list[Block]:
    """A block is what it says and everything before it."""
    return [tuple(text[: i + 1]) for i in range(len(text))]


class Model:
    """Slot to its blocks, oldest first."""

    def __init__(self) -> None:
        self.held: dict[int, list[Block]] = {}
        self.capacity: dict[int, int] = {}

    def shrink(self, slot: int) -> None:
        held, capacity = self.held[slot], self.capacity[slot]
        del held[: max(0, len(held) - capacity)]

    def insert(self, slot: int, text: str) -> None:
        held = self.held[slot]
        for block in reversed(blocks(text)[: self.capacity[slot]]):
            if block in held:
                held.remove(block)
            held.append(block)
        self.shrink(slot)

    def match(self, texts: list[str]) -> dict[int, int]:
        found = {}
        for slot, held in self.held.items():
            total = 0
            for text in texts:
                for block in blocks(text):
                    if block not in held:
                        break
                    total += 1
            if total:
                found[slot] = total
        return found


class Index(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex(block_tokens=BLOCK)
        self.model = Model()

    @rule(slot=SLOTS, capacity=st.integers(0, 12))
    def add_or_resize(self, slot: int, capacity: int) -> None:
        # 0 tokens mean that the engine does not publish its size; so ask for less than one block.
        self.index.add(slot, capacity * BLOCK or 1)
        self.model.held.setdefault(slot, [])
        self.model.capacity[slot] = capacity
        self.model.shrink(slot)

    @rule(slot=SLOTS)
    def remove(self, slot: int) -> None:
        self.index.remove(slot)
        self.model.held.pop(slot, None)

    @rule(slot=SLOTS)
    def clear(self, slot: int) -> None:
        self.index.clear(slot)
        if slot in self.model.held:
            self.model.held[slot] = []

    @rule(text=TEXTS)
    def insert_everywhere(self, text: str) -> None:
        for slot in list(self.model.held):
            self.insert(slot, [text])

    @rule(slot=SLOTS, texts=st.lists(TEXTS, min_size=1, max_size=3))
    def insert(self, slot: int, texts: list[str]) -> None:
        self.index.insert(slot, self.index.match(ask(texts)).chains)
        if slot in self.model.held:
            for text in texts:
                self.model.insert(slot, text)

    @rule(texts=st.lists(TEXTS, min_size=1, max_size=3))
    def match(self, texts: list[str]) -> None:
        match = self.index.match(ask(texts))
        assert match.blocks_by_slot == self.model.match(texts)
        assert match.total_blocks == sum(map(len, texts))
        for slot in self.model.held:
            assert match.tokens(slot) == BLOCK * self.model.match(texts).get(slot, 0)
            assert match.ratio(slot) == self.model.match(texts).get(slot, 0) / match.total_blocks

    @precondition(lambda self: self.model.held)
    @rule()
    def the_index_starts_anew_with_another_block_size(self) -> None:
        self.index.set_block_tokens(BLOCK)
        for held in self.model.held.values():
            held.clear()

    @invariant()
    def holds_as_many_blocks_as_the_model(self) -> None:
        for slot in NAMES:
            assert self.index.blocks(slot) == len(self.model.held.get(slot, ()))
        assert self.index.used_bytes == self.index.pair_bytes * sum(map(len, self.model.held.values()))

    @invariant()
    def what_an_endpoint_holds_is_closed_under_prefix(self) -> None:
        # Of the model, which the index equals: without it, finding a match by bisection would be wrong.
        for held in self.model.held.values():
            assert all(block[:-1] in held for block in held if len(block) > 1)


Index.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestIndexEqualsItsModel: Any = Index.TestCase
