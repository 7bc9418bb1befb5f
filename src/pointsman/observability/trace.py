"""The trace: one short line a request, enough to replay the load and nothing of what was said.

Prompts are there as lengths and as the runs of blocks they share with earlier ones. The hashes by which
that is found are salted anew for each file and stay in memory; neither they nor the salt are written.

A file is lines of JSON arrays. The first is ``Header``; ``Fleet`` comes at the start, every few minutes and
at the end; all others are ``Traced``, in the order in which requests ended.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import SystemRandom

import msgspec
from xxhash import xxh3_64, xxh3_64_intdigest

from pointsman.types import (
    TPOT_HEADERS,
    TTFT_HEADERS,
    Clock,
    Decision,
    Endpoint,
    InferenceRequest,
    Outcome,
)

VERSION = 1
BLOCK_BYTES = 256
"""Of prompt text in a block. A rest that does not fill one is nobody else's."""
MAX_BLOCKS = 2048
"""Of a prompt that are looked at: a mebibyte holds what engines hold."""
GENERATION_BLOCKS = 250_000
"""Two generations of blocks are remembered, 30 MB each at most; the older one is forgotten as a whole."""
MAX_NAME = 200
"""Characters of a model's name that are kept: clients choose it."""
FILE_TAG = "pointsman-trace"

Speeds = Mapping[str, float | int | None]
"""What a policy has learned of an endpoint, by the names that ``GET /endpoints`` has for it."""


class Ruled(msgspec.Struct, frozen=True, kw_only=True):
    """By which policy the requests were sent."""

    preset: str
    parameters: Mapping[str, Mapping[str, object]] = {}
    picker_config: str | None = None
    """Text of the EndpointPickerConfig that took the preset's place."""


class Header(msgspec.Struct, frozen=True, array_like=True, tag=FILE_TAG):
    """What the file is."""

    unix_s: float
    """When it began. Times of all other lines count from here."""
    policy: Ruled
    prefix_block_tokens: int = 0
    """As the setting ``prefix.block_tokens``."""
    metrics_interval_s: float = 0.1
    """As the setting ``metrics.interval_s``."""
    block_bytes: int = BLOCK_BYTES
    version: int = VERSION


class Known(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is known of an endpoint."""

    name: str
    engine: str = ""
    models: tuple[str, ...] | None = None
    block_tokens: int = 0
    kv_blocks: int = 0
    prefix_caching: bool | None = None
    labels: Mapping[str, str] = {}
    weight: float = 1.0
    price_per_hour: float = 0.0
    """0.0 where nobody told."""
    learned: Speeds | None = None


class Fleet(msgspec.Struct, frozen=True, array_like=True, tag="fleet"):
    """The endpoints as they are ``at_s``."""

    at_s: float
    endpoints: tuple[Known, ...]


class Traced(msgspec.Struct, frozen=True, array_like=True, tag="r", gc=False):
    """A request that has ended. Times in seconds, None where there was nothing to tell."""

    number: int
    at_s: float
    """Its arrival."""
    model: str
    endpoint: str
    stream: bool
    ending: str
    prompt_tokens: int
    """As the router estimates them, from bytes."""
    like: int
    """An earlier line of the file whose prompt begins with the same ``shared`` blocks; -1: none does."""
    shared: int
    new: int
    """Blocks after those that nobody had before."""
    max_tokens: int | None
    told_prompt_tokens: int | None
    """The next three as the engine said."""
    output_tokens: int | None
    cached_tokens: int | None
    response_bytes: int
    ttft_s: float | None
    duration_s: float
    tries: int
    priority: int
    slo_ttft_ms: float | None
    slo_tpot_ms: float | None
    matched_tokens: int
    """That the router believed to be cached."""
    predicted_ttft_s: float | None
    predicted_step_s: float | None


Facts = Callable[[], Sequence[tuple[Endpoint, Speeds | None]]]
"""The endpoints as they are, and what was learned of each."""


class Recorder:
    """An observer that makes the lines. ``begin`` first, and again for each new file."""

    def __init__(
        self, write: Callable[[bytes], None], header: Callable[[], Header], facts: Facts, clock: Clock
    ) -> None:
        self._write = write
        self._header = header
        self._facts = facts
        self._clock = clock
        self._encode = msgspec.json.Encoder().encode

    def begin(self) -> None:
        """The lines that follow go to a new file: it starts with its header, and nothing before counts."""
        self._salt = SystemRandom().getrandbits(64)
        self._blocks = _Blocks()
        self._number = 0
        self._begun_s = self._clock()
        self._line(self._header())
        self.fleet()

    def fleet(self) -> None:
        """Write what is known of the endpoints now."""
        known = tuple(_known(endpoint, learned) for endpoint, learned in self._facts())
        self._line(Fleet(self._since(self._clock()), known))

    def __call__(self, request: InferenceRequest, decision: Decision | None, outcome: Outcome) -> None:
        if decision is None:
            at_s, like, shared, new = self._clock(), -1, 0, 0
        else:
            at_s = decision.at_s - outcome.decided_s
            like, shared, new = self._place(request)
        usage, predicted = outcome.usage, decision.predicted if decision else None
        self._line(
            Traced(
                self._number,
                self._since(at_s),
                request.model[:MAX_NAME] if decision else "",
                outcome.endpoint,
                request.stream,
                outcome.ending.value,
                request.prompt_tokens,
                like,
                shared,
                new,
                request.max_tokens,
                usage.prompt_tokens,
                usage.output_tokens,
                usage.cached_tokens,
                outcome.response_bytes,
                _rounded(outcome.ttft_s),
                round(outcome.duration_s, 6),
                outcome.tries,
                request.priority,
                _limit(request, TTFT_HEADERS),
                _limit(request, TPOT_HEADERS),
                decision.matched_tokens if decision else 0,
                _rounded(predicted.queue_s + predicted.prefill_s if predicted else None),
                _rounded(predicted.step_s if predicted else None),
            )
        )
        self._number += 1

    def _place(self, request: InferenceRequest) -> tuple[int, int, int]:
        if not request.prompts:
            return -1, 0, 0
        seed = xxh3_64_intdigest(request.root, xxh3_64_intdigest(request.model.encode(), self._salt))
        return self._blocks.place(memoryview(request.prompts[0].data), seed, self._number)

    def _since(self, at_s: float) -> float:
        return round(at_s - self._begun_s, 6)

    def _line(self, record: msgspec.Struct) -> None:
        self._write(self._encode(record) + b"\n")


class _Blocks:
    """Which request had a block, with all that is before it, in its prompt.

    In either generation the blocks before a block are there, too, so how far a prompt is known is found by
    bisection: a long one that came before is hashed a few times as a whole, not block by block.
    """

    def __init__(self) -> None:
        self._young: dict[int, int] = {}
        self._old: dict[int, int] = {}

    def place(self, data: memoryview, seed: int, number: int) -> tuple[int, int, int]:
        """Whose first blocks these are, how many, and how many more there are; ``number`` has them, too."""
        blocks = min(len(data) // BLOCK_BYTES, MAX_BLOCKS)
        shared, like = 0, -1
        beyond = blocks + 1
        while beyond - shared > 1:
            middle = (shared + beyond) // 2
            digest = xxh3_64_intdigest(data[: middle * BLOCK_BYTES], seed)
            found = self._young.get(digest)
            if found is None:
                found = self._old.get(digest)
            if found is None:
                beyond = middle
            else:
                shared, like = middle, found
        self._add(data, seed, number, shared, blocks)
        return like, shared, blocks - shared

    def _add(self, data: memoryview, seed: int, number: int, shared: int, blocks: int) -> None:
        if not blocks:
            return
        first = shared
        if shared and xxh3_64_intdigest(data[: shared * BLOCK_BYTES], seed) not in self._young:
            first = 0  # take what was used again into the young generation
        if first == blocks:
            return
        if len(self._young) + blocks - first > GENERATION_BLOCKS:
            self._old, self._young = self._young, {}
            first = 0
        young = self._young
        state = xxh3_64(data[: first * BLOCK_BYTES], seed)
        for i in range(first, blocks):
            state.update(data[i * BLOCK_BYTES : (i + 1) * BLOCK_BYTES])
            young[state.intdigest()] = number


def _known(endpoint: Endpoint, learned: Speeds | None) -> Known:
    metrics = endpoint.metrics
    return Known(
        name=endpoint.name,
        engine=endpoint.engine,
        models=None if endpoint.models is None else tuple(sorted(endpoint.models)),
        block_tokens=metrics.block_tokens,
        kv_blocks=metrics.kv_blocks,
        prefix_caching=metrics.prefix_caching,
        labels=endpoint.labels,
        weight=endpoint.weight,
        price_per_hour=endpoint.price_per_hour,
        learned=learned,
    )


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)


def _limit(request: InferenceRequest, names: Sequence[str]) -> float | None:
    """The first of the headers that there is, when it is a positive number."""
    given = next((request.headers[name] for name in names if name in request.headers), None)
    try:
        value = float(given or 0)
    except ValueError:
        return None
    return value if 0 < value < float("inf") else None
