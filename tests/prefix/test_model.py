"""The prefix index against a plain model: per endpoint the blocks it was sent, least recently used first.

What an endpoint still holds is asked block by block. It must be a part of the model's list that leaves no
hole, contains what was used most recently, and is matched as walking over it would.
"""

from __future__ import annotations

from itertools import product
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pointsman.prefix.approximate import PrefixIndex
from pointsman.prefix.segments import GENERATIONS
from pointsman.testing import request
from pointsman.types import InferenceRequest, Prompt

BLOCK = 64
NAMES = (0, 1, 2, 3, 4, 5, 6, 40)
SLOTS = st.sampled_from(NAMES)
TEXTS = st.text("ab", min_size=1, max_size=7)
"""A letter stands for one block, so that prompts often share prefixes."""

Block = tuple[str, ...]


def ask(texts: list[str]) -> InferenceRequest:
    prompts = tuple(
        Prompt((t[0] * 3 * BLOCK * 4 + "".join(c * BLOCK * 4 for c in t)).encode(), tokens(len(t)))
        for t in texts
    )
    return request(prompts=prompts, prompt_tokens=sum(p.tokens for p in prompts))


def tokens(letters: int) -> int:
    """The first block is four times as large as the next ones."""
    return BLOCK * (letters + 3) if letters else 0


def blocks(text: str) -> list[Block]:
    """A block is what it says and everything before it."""
    return [tuple(text[: i + 1]) for i in range(len(text))]


EVERY = ["".join(letters) for n in range(1, 8) for letters in product("ab", repeat=n)]
"""Every prompt there can be."""


class Model:
    """Slot to its blocks, least recently used first, as if nothing was ever forgotten for want of room."""

    def __init__(self) -> None:
        self.used: dict[int, list[Block]] = {}
        self.capacity: dict[int, int] = {}

    def insert(self, slot: int, text: str) -> None:
        used = self.used[slot]
        for block in reversed(blocks(text)[: max(0, self.capacity[slot] - 3)]):
            if block in used:
                used.remove(block)
            used.append(block)

    def recent(self, slot: int) -> list[Block]:
        """Must still be there: all that fits, but for a generation and the prompt that closed it."""
        sure = (self.capacity[slot] - self.capacity[slot] // GENERATIONS - 10) // 4
        return self.used[slot][-sure:] if sure > 0 else []


class Index(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex(block_tokens=BLOCK)
        self.model = Model()

    @rule(slot=SLOTS, capacity=st.integers(0, 40))
    def add_or_resize(self, slot: int, capacity: int) -> None:
        # 0 tokens mean that the engine does not publish its size; so ask for less than one block.
        self.index.add(slot, capacity * BLOCK or 1)
        used = self.model.used.setdefault(slot, [])
        used[:] = [block for block in used if block in self.held(slot)]
        self.model.capacity[slot] = capacity

    @rule(slot=SLOTS)
    def remove(self, slot: int) -> None:
        self.index.remove(slot)
        self.model.used.pop(slot, None)
        self.model.capacity.pop(slot, None)

    @rule(slot=SLOTS)
    def clear(self, slot: int) -> None:
        self.index.clear(slot)
        if slot in self.model.used:
            self.model.used[slot] = []

    @rule(text=TEXTS)
    def insert_everywhere(self, text: str) -> None:
        for slot in list(self.model.used):
            self.insert(slot, [text])

    @rule(slot=SLOTS, texts=st.lists(TEXTS, min_size=1, max_size=3))
    def insert(self, slot: int, texts: list[str]) -> None:
        self.index.insert(slot, self.index.match(ask(texts)).chains)
        if slot in self.model.used:
            for text in texts:
                self.model.insert(slot, text)
            fitting = min(len(texts[-1]), max(0, self.model.capacity[slot] - 3))
            assert self.index.match(ask(texts[-1:])).tokens(slot) == tokens(fitting)

    @rule(texts=st.lists(TEXTS, min_size=1, max_size=3))
    def matches_as_walking_would(self, texts: list[str]) -> None:
        match = self.index.match(ask(texts))
        asked = sum(tokens(len(text)) for text in texts)
        assert match.total == asked // BLOCK
        for slot in self.model.used:
            held = self.held(slot)
            expected = sum(tokens(len([b for b in blocks(text) if b in held])) for text in texts)
            assert match.tokens(slot) == expected
            assert match.ratio(slot) == expected / asked

    @rule()
    def goes_on_in_another_process(self) -> None:
        old, self.index = self.index, PrefixIndex(block_tokens=BLOCK)
        for slot, capacity in self.model.capacity.items():
            self.index.add(slot, capacity * BLOCK or 1)
            before = [old.match(ask([text])).held_by_slot.get(slot) for text in EVERY]
            self.index.load(slot, old.dump(slot, 1 << 20))
            assert [self.index.match(ask([text])).held_by_slot.get(slot) for text in EVERY] == before

    @precondition(lambda self: self.model.used)
    @rule()
    def the_index_starts_anew_with_another_block_size(self) -> None:
        self.index.set_block_tokens(BLOCK)
        for used in self.model.used.values():
            used.clear()

    def held(self, slot: int) -> set[Block]:
        return {
            tuple(text) for text in EVERY if self.index.match(ask([text])).tokens(slot) == tokens(len(text))
        }

    @invariant()
    def holds_what_was_used_most_recently_without_holes(self) -> None:
        total = 0
        for slot in NAMES:
            total += self.index.blocks(slot)
            assert self.index.tokens(slot) <= BLOCK * self.model.capacity.get(slot, 0)
        assert self.index.used_bytes == self.index.pair_bytes * total
        slots = list(self.model.used)
        if slots:  # one of them; asking for every block of all would take long
            slot = slots[total % len(slots)]
            held = self.held(slot)
            assert len(held) == self.index.blocks(slot)
            assert held <= set(self.model.used[slot])
            assert held >= set(self.model.recent(slot))
            assert all(block[:-1] in held for block in held if len(block) > 1)


Index.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestIndexEqualsItsModel: Any = Index.TestCase
