"""How long answers get: by model, by the limit the request sets, and by who asks.

Four levels, each held near the one above it as long as it knows little: all answers; those of a model; those
of a model to requests of about the same ``max_tokens``; and of these, those to one tenant (llm-d's fairness
id) or, where a request names none, to prompts that begin alike. Whatever names them is kept as a hash only.

An answer that reached its limit ended there for requests of that limit; of what the model would have said
without, it tells no more than an answer that was broken off.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from functools import lru_cache
from math import inf

import msgspec
from xxhash import xxh3_64_intdigest

from pointsman.predictor.state import LengthsState, TableState, bins_state
from pointsman.predictor.survival import EDGES, Table, exponential
from pointsman.types import Ending, InferenceRequest, Outcome, Prediction

MEMORY = 4000
GROUP_MEMORY = 1000
"""Answers that count, in all and of one group; then each counts for half."""
PRIOR = 1.0
GROUP_PRIOR = 5.0
"""Answers that the level above weighs as much as: groups differ by less than limits do."""
DEFAULT_TOKENS = 300.0
BYTES_PER_TOKEN = 220.0
"""A stream carries about so much for each token, until its own is known."""
BYTES_MEMORY_TOKENS = 100_000
MOST_WAITING = 20_000
MAX_LEVELS = 512
MAX_GROUPS = 1024
MAX_BITS = 20
"""Limits above half a million are none."""
KEPT_LEVELS = 32
KEPT_GROUPS = 64
"""Over a restart: those that stand on the most."""
HALF_LIFE_S = 86_400.0
"""Of confidence while nobody looks: what is asked for changes by the day, the speed of an engine sooner."""
FOLLOW_S = 0.004
"""Least time from one request that is followed to the next: learning takes ten times as long as deciding."""
HEAD_BYTES = 256
"""Prompts that agree so far begin alike: the chat's frame and the first lines of a system prompt."""
TENANT_HEADERS = ("x-llm-d-inference-fairness-id", "x-gateway-inference-fairness-id")


class _Sort(msgspec.Struct, frozen=True, gc=False):
    """What sort of request it was: the keys of its tables, and nothing that keeps the request itself."""

    model: int
    limit: int
    group: int
    """0: nothing tells who asks."""
    bits: int
    cut_at: float
    """Tokens at which it is cut."""


class _Answer:
    """An answer under way, or waiting for those sent before it."""

    __slots__ = ("over", "overtaken", "sort", "tokens", "whole")

    def __init__(
        self, sort: _Sort, tokens: float = 0.0, *, whole: bool = False, overtaken: bool = False
    ) -> None:
        self.sort = sort
        self.tokens = tokens
        """0.0: nothing is known of its length."""
        self.whole = whole
        """It was not broken off."""
        self.over = False
        self.overtaken = overtaken
        """It is in no order any more: too many came after it."""


class Lengths:
    """Knows the usual length of an answer, the better the more came back."""

    def __init__(self, most_waiting: int = MOST_WAITING) -> None:
        """At most so many answers wait for one that was sent before them."""
        self._most_waiting = most_waiting
        self.pool = Table(exponential(DEFAULT_TOKENS), prior=PRIOR, memory=MEMORY)
        self.levels: dict[int, Table] = {}
        self.groups: OrderedDict[int, Table] = OrderedDict()
        """Least recently answered first."""
        self._bytes, self._tokens = BYTES_PER_TOKEN, 1.0
        self._followed_s = -inf
        self._open: dict[int, _Answer] = {}
        """By the identity of the request, as long as it is under way."""
        self._order: deque[_Answer] = deque()
        """As they were sent, from the first that is not over."""

    def of(self, request: InferenceRequest) -> Table:
        """What to expect of this request."""
        model, limit, _, _ = _limited(request.model, request.max_tokens)
        if self.groups:
            found = self.groups.get(group_key(request, limit))
            if found is not None:
                return found
        return self.levels.get(limit) or self.levels.get(model) or self.pool

    def sent(self, request: InferenceRequest, now_s: float) -> None:
        """The request goes out. What becomes of it is learned after what became of those sent before it:
        short answers come first, and whoever learned them at once would expect too little of those to come.
        Of many at a time a few are followed, and the others never looked at again.
        """
        if now_s - self._followed_s < FOLLOW_S or id(request) in self._open:  # it was tried elsewhere before
            return
        self._followed_s = now_s
        answer = self._open[id(request)] = _Answer(_sort_of(request))
        self._order.append(answer)
        if len(self._order) > self._most_waiting:
            self._order.popleft().overtaken = True

    def observe(self, request: InferenceRequest, outcome: Outcome, predicted: Prediction | None) -> None:
        """The request is over, however it ended."""
        answer = self._open.pop(id(request), None)
        if answer is None:
            return
        usage = outcome.usage.output_tokens
        tokens = usage / request.n if usage else self._given(request, outcome, predicted)
        answer.over = True
        if tokens >= 1 and outcome.ending in (Ending.OK, Ending.CANCELLED, Ending.FAILED):
            answer.tokens, answer.whole = tokens, outcome.ending is Ending.OK
        if answer.overtaken:
            self._learn(answer)
        order = self._order
        while order and order[0].over:
            self._learn(order.popleft())
        if usage and request.stream and outcome.response_bytes:
            kept = 0.5 ** (usage / BYTES_MEMORY_TOKENS)
            self._bytes = self._bytes * kept + outcome.response_bytes
            self._tokens = self._tokens * kept + usage

    def add(self, request: InferenceRequest, tokens: float) -> None:
        """An answer to ``request`` has ended well after ``tokens``, of each choice."""
        self._learn(_Answer(_sort_of(request), tokens, whole=True))

    def left(self, request: InferenceRequest, tokens: float) -> None:
        """An answer to ``request`` was broken off after ``tokens``: cancelled, timed out, failed."""
        self._learn(_Answer(_sort_of(request), tokens))

    def _learn(self, answer: _Answer) -> None:
        tokens, sort = answer.tokens, answer.sort
        if not tokens:
            return
        model = self._level(sort.model, self.pool)
        limited = self._level(sort.limit, model, sort.bits)
        tables = [self.pool, limited]
        if sort.group:
            tables.append(self._group(sort.group, limited, sort.bits))
        if not answer.whole:
            for table in (*tables, model):
                table.left(tokens)
            return
        for table in tables:
            table.ended(tokens)
        if tokens < sort.cut_at:
            model.ended(tokens)
        else:
            model.left(tokens)

    def state(self) -> LengthsState:
        """What is kept over a restart."""
        levels = sorted(self.levels.items(), key=lambda item: item[1].weight)[-KEPT_LEVELS:]
        known = {id(table): key for key, table in levels} | {id(self.pool): 0}
        worth = sorted(self.groups.values(), key=lambda table: table.weight)[-KEPT_GROUPS:]
        kept = {id(table) for table in worth if id(table.parent) in known}
        groups = [(key, table) for key, table in self.groups.items() if id(table) in kept]
        return LengthsState(
            bins_state(self.pool.bins),
            tuple(_state(key, known.get(id(table.parent), 0), table) for key, table in levels),
            tuple(_state(key, known[id(table.parent)], table) for key, table in groups),
        )

    def restore(self, state: LengthsState, passed_s: float) -> None:
        """Begin with what was known ``passed_s`` ago."""
        kept = 0.5 ** (passed_s / HALF_LIFE_S)
        self.pool.recall(state.pool, kept)
        for each in sorted(state.levels, key=lambda each: each.parent != 0):  # models first
            parent = self.levels.get(each.parent, self.pool)
            self.levels[each.key] = _restored(each, parent, PRIOR, MEMORY, kept)
        for each in state.groups:
            parent = self.levels[each.parent]
            self.groups[each.key] = _restored(each, parent, GROUP_PRIOR, GROUP_MEMORY, kept)

    def _given(self, request: InferenceRequest, outcome: Outcome, predicted: Prediction | None) -> float:
        """How many tokens there were in the end: by the bytes of a stream, else by what the engine's counters
        tell, or by the time until it was broken off.
        """
        if request.stream and outcome.response_bytes:
            return outcome.response_bytes * self._tokens / self._bytes / request.n
        if outcome.likely_tokens:
            return outcome.likely_tokens
        if outcome.ending is Ending.OK or predicted is None or (request.stream and outcome.ttft_s is None):
            return 0.0
        first_s = outcome.ttft_s or predicted.queue_s + predicted.prefill_s
        return max(0.0, outcome.duration_s - first_s) / predicted.step_s

    def _level(self, key: int, parent: Table, bits: int = 0) -> Table:
        found = self.levels.get(key)
        if found is None:
            found = Table(parent, prior=PRIOR, memory=MEMORY, limit=most(bits))
            if len(self.levels) < MAX_LEVELS:  # a client may invent names of models
                self.levels[key] = found
        return found

    def _group(self, key: int, parent: Table, bits: int) -> Table:
        groups = self.groups
        found = groups.get(key)
        if found is None:
            found = groups[key] = Table(parent, prior=GROUP_PRIOR, memory=GROUP_MEMORY, limit=most(bits))
            if len(groups) > MAX_GROUPS:
                groups.popitem(last=False)
        else:
            groups.move_to_end(key)
        return found


def _state(key: int, parent: int, table: Table) -> TableState:
    return TableState(key, parent, table.limit, bins_state(table.bins))


def _restored(state: TableState, parent: Table, prior: float, memory: float, kept: float) -> Table:
    table = Table(parent, prior=prior, memory=memory, limit=state.limit)
    table.recall(state.bins, kept)
    return table


def _sort_of(request: InferenceRequest) -> _Sort:
    model, limit, bits, cut_at = _limited(request.model, request.max_tokens)
    return _Sort(model, limit, group_key(request, limit), bits, cut_at)


def model_key(model: str) -> int:
    return xxh3_64_intdigest(model.encode())


@lru_cache(maxsize=MAX_LEVELS)
def _limited(model: str, max_tokens: int | None) -> tuple[int, int, int, float]:
    """Keys of the model and of the limit to the next power of two, its bits, and the limit."""
    bits = min(MAX_BITS, max_tokens.bit_length()) if max_tokens else 0
    key = model_key(model)
    cut_at = inf if max_tokens is None else max_tokens
    return key, xxh3_64_intdigest(bytes((bits,)), key), bits, cut_at


def most(bits: int) -> float:
    """The longest answer to a request with such a limit."""
    return 2.0**bits - 1 if 0 < bits < MAX_BITS else EDGES[-1]


def group_key(request: InferenceRequest, limit: int) -> int:
    """Of who asks, with the model and the limit; 0 where nothing tells."""
    headers = request.headers
    for name in TENANT_HEADERS:
        if name in headers and (tenant := headers[name]):
            return xxh3_64_intdigest(tenant.encode(), limit)
    if not request.prompts:
        return 0
    seed = xxh3_64_intdigest(request.root, limit) if request.root else limit
    return xxh3_64_intdigest(request.prompts[0].data[:HEAD_BYTES], seed)
