"""The precise index against a plain model: by endpoint and tier a dict from engine hash to what the block
says.

Events come in any order, twice, or not at all, so parents are often unknown. A block is what it says and
everything before it, its adapter and its salt.
"""

from __future__ import annotations

from array import array
from hashlib import sha256
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pointsman.prefix.blocks_expected import SPECULATIVE_S
from pointsman.prefix.kv_wire import Cleared, Event, Removed, Stored
from pointsman.prefix.precise import FULL_ATTENTION, TIER_WEIGHTS, PreciseIndex
from pointsman.testing import request
from pointsman.types import InferenceRequest, Tokenized

SIZES = {0: 2, 1: 4, 40: 4}
"""Block size of the endpoint in each slot. A letter of a text is four tokens."""
SLOTS = st.sampled_from(list(SIZES))
TEXTS = st.sampled_from(["a", "ab", "ab", "abb", "abab", "abab", "ba"])
ADAPTERS = st.sampled_from(["", "", "", "", "x"])
SALTS = st.sampled_from(["", "", "", "", "s"])
SEEDS = st.sampled_from([0, 0, 0, 1])
"""An engine that restarted unnoticed has other hashes for the same blocks."""
TIERS = st.sampled_from(["gpu", "gpu", "gpu", "cpu", "tape"])
KINDS = st.sampled_from(["", "full_attention", "mla_attention", "sliding_window"])

What = tuple[int, str, str, str, int]
WHAT = st.none() | st.none() | st.none() | st.tuples(SLOTS, TEXTS, ADAPTERS, SALTS, SEEDS)

Block = tuple[int, str, str, bytes]
WHOLE = ("abab", "abbb", "baab")
"""Texts that the others are beginnings of."""


def tokens(text: str) -> bytes:
    return array("I", [ord(c) + i for c in text for i in range(4)]).tobytes()


def blocks(size: int, text: str, adapter: str, salt: str) -> list[Block]:
    ids = tokens(text)
    return [(size, adapter, salt, ids[:end]) for end in range(size * 4, len(ids) + 1, size * 4)]


def name(block: Block, seed: int) -> int:
    """What the engine calls it."""
    return int.from_bytes(sha256(repr((block, seed)).encode()).digest()[:8], "big")


def ask(texts: tuple[str, ...], adapter: str, salt: str) -> InferenceRequest:
    """The prompts with a token more: the last is computed anew, and we want to be told of every block."""
    tokenized = tuple(Tokenized(tokens(text) + b"last") for text in texts)
    return request(model=adapter or "m", cache_salt=salt, tokenized=tokenized)


class Model:
    def __init__(self) -> None:
        self.held: dict[str, dict[int, Block]] = {}
        self.expected: dict[Block, float] = {}
        self.groups: set[int] = set()
        self.fed = False
        self.size = 0

    def known(self, engine_hash: int) -> Block | None:
        return next((table[engine_hash] for table in self.held.values() if engine_hash in table), None)

    def find(self, wanted: list[Block], now_s: float) -> tuple[int, float]:
        """Blocks in a row from the first, and the sum of their weights. Those after the first that the
        engine has not told of will be computed where they are expected, and so be in the best tier.
        """
        run, weight, told = 0, 0.0, True
        for block in wanted:
            tiers = [TIER_WEIGHTS.get(t, 1.0) for t, table in self.held.items() if block in table.values()]
            told = told and bool(tiers)
            if not told and self.expected.get(block, 0.0) > now_s:
                tiers = [1.0]
            if not tiers:
                break
            run, weight = run + 1, weight + max(tiers)
        return run, weight


class Index(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index = PreciseIndex(max_bytes=1 << 24)
        self.index.name_adapters("x")
        self.models: dict[int, Model] = {}
        self.now_s = 10.0
        self.past: list[tuple[int, list[Event]]] = []
        self.last: What = (0, "ab", "", "", 0)
        for slot in SIZES:
            self.join(slot)

    @rule(slot=SLOTS, how=st.sampled_from(["join", "leave", "restart", "lose all", *["nothing"] * 4]))
    def upset(self, slot: int, how: str) -> None:
        if how == "leave":
            self.index.remove(slot)
            self.models.pop(slot, None)
        elif how == "restart":
            self.index.clear(slot)
            if slot in self.models:
                self.models[slot].held, self.models[slot].expected = {}, {}
        elif how == "lose all":
            self.send(slot, Cleared())
        elif how == "join":
            self.join(slot)

    def join(self, slot: int) -> None:
        self.index.add(slot)
        self.models.setdefault(slot, Model())

    def the(self, what: What | None) -> What:
        """None: what the rule before spoke of."""
        self.last = what or self.last
        return self.last

    @rule(what=WHAT, tier=TIERS, kind=KINDS, at=st.data())
    def store(self, what: What | None, tier: str, kind: str, at: Any) -> None:
        slot, text, adapter, salt, seed = self.the(what)
        chain = blocks(SIZES[slot], text, adapter, salt)
        first = at.draw(st.sampled_from([0, 0, *range(len(chain))]))
        new = chain[first:]
        extra = ((adapter,) if adapter else ()) + ((salt,) if salt and not first else ())
        extras = (extra or None, *[(adapter,) if adapter else None] * (len(new) - 1))
        self.send(
            slot,
            Stored(
                [name(b, seed) for b in new],
                name(chain[first - 1], seed) if first else None,
                tokens(text)[first * SIZES[slot] * 4 :],
                SIZES[slot],
                adapter,
                tier,
                extras if any(extras) else (),
                0 if kind in FULL_ATTENTION else 1,
                kind,
            ),
        )

    @rule(what=WHAT, tier=TIERS)
    def move(self, what: What | None, tier: str) -> None:
        slot, text, adapter, salt, seed = self.the(what)
        chain = blocks(SIZES[slot], text, adapter, salt)
        self.send(slot, Stored([name(b, seed) for b in chain], None, b"", 0, adapter, tier))

    @rule(what=WHAT, tier=TIERS, group=st.sampled_from([None, 0, 0, 1]))
    def remove(self, what: What | None, tier: str, group: int | None) -> None:
        slot, text, adapter, salt, seed = self.the(what)
        for block in blocks(SIZES[slot], text, adapter, salt)[-2:]:
            self.send(slot, Removed([name(block, seed)], tier, group))

    @rule(which=st.data())
    def replay(self, which: Any) -> None:
        """Messages from the past, once more."""
        if self.past:
            start = which.draw(st.integers(0, len(self.past) - 1))
            for slot, events in self.past[start : start + 6]:
                self.send(slot, *events)

    @rule(what=WHAT, other=TEXTS, looked=st.booleans())
    def sent(self, what: What | None, other: str, looked: bool) -> None:
        slot, text, adapter, salt, _ = self.the(what)
        texts = text, other
        one = ask(texts, adapter, salt)
        self.index.sent(slot, one, self.now_s, self.index.match(one, self.now_s) if looked else None)
        model = self.models.get(slot)
        if model and model.size:
            for text in texts:
                chain = blocks(model.size, text, adapter, salt)
                told = 0
                while told < len(chain) and any(chain[told] in t.values() for t in model.held.values()):
                    told += 1
                for block in chain[told:]:
                    model.expected[block] = self.now_s + SPECULATIVE_S

    @rule(passed_s=st.sampled_from([0.0, 0.1, 1.0, 3.0]))
    def wait(self, passed_s: float) -> None:
        self.now_s += passed_s

    def send(self, slot: int, *events: Event) -> None:
        self.past = [*self.past[-30:], (slot, list(events))]
        self.index.apply(slot, events, self.now_s)
        model = self.models.get(slot)
        if model is not None:
            model.fed = True
            for event in events:
                self.learn(model, event)

    def learn(self, model: Model, event: Event) -> None:
        if isinstance(event, Cleared):
            model.held, model.expected = {}, {}
        elif isinstance(event, Removed):
            if event.group is None or event.group in model.groups:
                for engine_hash in event.hashes:
                    model.held.get(event.medium, {}).pop(engine_hash, None)
        elif event.kind in FULL_ATTENTION:
            model.groups.add(event.group)
            table = model.held.get(event.medium, {})
            if not event.token_ids:
                table.update({h: b for h in event.hashes if (b := model.known(h))})
            elif event.parent is None or model.known(event.parent):
                model.size = event.block_size
                before = model.known(event.parent)[3] if event.parent is not None else b""  # type: ignore[index]
                salted = any("s" in extra for extra in event.extra_keys if extra)
                if event.parent is not None:
                    salted = model.known(event.parent)[2] == "s"  # type: ignore[index]
                for number, engine_hash in enumerate(event.hashes, 1):
                    text = before + event.token_ids[: number * event.block_size * 4]
                    block = (event.block_size, event.lora, "s" if salted else "", text)
                    table[engine_hash] = block
                    model.expected.pop(block, None)
            model.held[event.medium] = table

    @invariant()
    def finds_what_the_model_finds(self) -> None:
        fed = {slot for slot, model in self.models.items() if model.fed}
        for text in WHOLE:
            for adapter, salt in (("", ""), ("x", ""), ("", "s"), ("x", "s")):
                match = self.index.match(ask((text,), adapter, salt), self.now_s)
                assert match.slots == fed
                for slot, model in self.models.items():
                    size = SIZES[slot]
                    run, weight = model.find(blocks(size, text, adapter, salt), self.now_s)
                    assert match.tokens(slot) == run * size
                    assert abs(match.weighted(slot) - weight * size) < 1e-9
                assert set(match.tokens_by_slot) <= set(self.models)

    @invariant()
    def sums_over_the_prompts_of_a_batch(self) -> None:
        both = self.index.match(ask(("ab", "ba"), "", ""), self.now_s)
        alone = [self.index.match(ask((text,), "", ""), self.now_s) for text in ("ab", "ba")]
        for slot in SIZES:
            assert both.tokens(slot) == sum(one.tokens(slot) for one in alone)

    @invariant()
    def holds_no_more_than_the_model(self) -> None:
        for slot in SIZES:
            model = self.models.get(slot)
            assert self.index.blocks(slot) == (sum(map(len, model.held.values())) if model else 0)
        if not self.models:
            assert self.index.used_bytes == 0


TestIndex = Index.TestCase
TestIndex.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
