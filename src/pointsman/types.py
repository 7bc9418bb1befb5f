"""The values everything speaks of: request, endpoint, decision, outcome. Frozen, shared freely, import
nothing above.

Times are seconds (``_s``) on the monotonic clock of whoever runs the core; sizes say their unit in their
name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum

import msgspec

Clock = Callable[[], float]
"""Seconds, monotonic. The core never reads a clock of its own, so the simulator can bring virtual time."""

ROLE_LABEL = "llm-d.ai/role"
TTFT_HEADERS = ("x-llm-d-slo-ttft-ms", "x-slo-ttft-ms")
TPOT_HEADERS = ("x-llm-d-slo-tpot-ms", "x-slo-tpot-ms")
"""llm-d's request headers for what a client was promised: the new name, which counts, and the old one."""
BYTES_PER_TOKEN = 4
"""Bytes of prompt text a token stands for where no tokenizer is at hand (llm-d's estimate backend, facts
3.5).
"""


class Prompt(msgspec.Struct, frozen=True, gc=False):
    """One prompt as the client wrote it: the bytes whose prefix decides cache hits, and how many tokens
    they are.
    """

    data: bytes | memoryview
    """All of it; with ``digests`` perhaps only its beginning."""
    tokens: int
    digests: bytes = b""
    """Hashes of its blocks, where another process has made them (``prefix.hashing``)."""
    size_bytes: int = 0
    """Where ``data`` is only its beginning."""

    @property
    def size(self) -> int:
        """Bytes of all of it."""
        return self.size_bytes or len(self.data)


class Tokenized(msgspec.Struct, frozen=True, gc=False):
    """One prompt as engines see it."""

    ids: bytes
    """Token ids, four bytes each, little-endian."""
    media: tuple[tuple[str, int, int], ...] = ()
    """Images and the like: content hash as the engine names it, first token of its placeholder, tokens."""

    @property
    def count(self) -> int:
        """How many tokens it has."""
        return len(self.ids) // 4


class InferenceRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request parsed once. ``body`` is forwarded as it came; everything else was read from it or from the
    head.
    """

    id: str
    path: str
    format: str
    """Name of the parser that read it: openai, anthropic, ... or ``passthrough``."""
    body: bytes = b""
    model: str = ""
    stream: bool = False
    prompts: tuple[Prompt, ...] = ()
    root: bytes = b""
    """What must be equal before any block can be: cache_salt, tools, instructions. Seeds the hash chain
    with the model.
    """
    tokenized: tuple[Tokenized, ...] = ()
    """The prompts as token ids, in their order; empty where nobody needs them or they are not known."""
    untokenized: str = ""
    """Why they, or their blocks in a shared index, are not known although somebody needs them."""
    cache_salt: str = ""
    """Only requests with the same salt share KV blocks."""
    prompt_tokens: int = 0
    max_tokens: int | None = None
    n: int = 1
    """Choices asked for; each is a sequence of its own to decode."""
    media: tuple[tuple[str, int], ...] = ()
    """(content hash, estimated tokens) of each image, video or audio part."""
    state_id: str = ""
    """Id of earlier state this call builds on (a response, conversation or file); its holder must answer."""
    headers: Mapping[str, str] = {}
    """Lower-cased request headers. Steering headers are here; they are not forwarded."""
    priority: int = 0


class Metrics(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine's metrics page said last. ``at_s`` is 0.0 when it has never been read."""

    at_s: float = 0.0
    waiting: float = 0.0
    running: float = 0.0
    kv_usage: float = 0.0
    """Share of KV blocks in use, 0 to 1."""
    block_tokens: int = 0
    """Tokens in a KV block; 0 where unknown."""
    kv_blocks: int = 0
    prefix_caching: bool | None = None
    loras_active: frozenset[str] = frozenset()
    loras_waiting: frozenset[str] = frozenset()
    max_loras: int = 0
    prefix_queries: float = 0.0
    """Tokens looked up in the engine's own prefix cache since it started; ``prefix_hits`` of them were
    found.
    """
    prefix_hits: float = 0.0
    started_s: float = 0.0
    """When the engine's process started, seconds since 1970; 0.0 where it does not say."""
    generation_tokens: float = 0.0
    """Output tokens since the engine started; 0.0 where it does not say."""
    preemptions: float = 0.0
    first_tokens: float = 0.0
    """Requests that have had their first token since the engine started, and the seconds from their arrival
    to it in all.
    """
    first_wait_s: float = 0.0
    ended: float = 0.0
    """Requests that have left the engine since it started, however they did."""
    attributes: Mapping[str, float] = {}
    """Custom metrics by attribute key (core-metrics-extractor's ``customMetrics``)."""


class UnderWay(msgspec.Struct, gc=False):
    """A request in flight at an endpoint."""

    sent_s: float
    tokens: int
    """Its uncached prompt tokens."""
    ahead_tokens: int
    """The same, and those queued before them."""
    seen: bool
    """We shall see its first output; else only the engine's counters tell of it."""
    first_step: float | None = None
    """``Load.steps`` at its first output."""


class Load:
    """What we have in flight at one endpoint right now: exact, known at once, owned by the pool; and counts
    of what came out of it so far.

    Only ``router.Flight`` and the exchange that owns it write here, so that nothing leaks or goes negative;
    and the pool, what engines' counters tell of.
    """

    __slots__ = (
        "ahead_tokens",
        "before_first",
        "changes",
        "context_tokens",
        "first_outputs",
        "first_wait_s",
        "others",
        "received_bytes",
        "requests",
        "sent",
        "since_sum_s",
        "steps",
        "tokens",
    )

    def __init__(self) -> None:
        self.requests = 0
        self.tokens = 0
        """Uncached prompt tokens whose first output has not been seen yet."""
        self.context_tokens = 0
        """Prompt tokens, cached or not."""
        self.since_sum_s = 0.0
        """Sum of the moments at which they were sent."""
        self.first_outputs = 0
        """First outputs of streams so far; ``first_wait_s`` is how long they took in all, and
        ``ahead_tokens`` how many uncached prompt tokens were to be computed until then, their own and those
        queued before them.
        """
        self.first_wait_s = 0.0
        self.ahead_tokens = 0
        self.before_first: dict[int, UnderWay] = {}
        """Those whose first output is still to come, by what ``sent`` was when they were sent: the oldest
        first.
        """
        self.others = 0.0
        """Requests at the endpoint that others sent, as its metrics page said last; 0 without one."""
        self.steps = 0.0
        """Tokens that each running request has been given so far, as the engine's counters tell."""
        self.received_bytes = 0
        """Response bytes so far, a moment late."""
        self.sent = 1
        """Grows with each request that is sent here; begins at one."""
        self.changes = 1
        """Grows with each change of what is in flight: whoever computes something from it can tell."""

    def first_output(self, number: int, wait_s: float | None) -> None:
        """The request sent as ``number`` has been computed; ``wait_s`` is how long that took, None where it
        is not known. Later calls do nothing.
        """
        request = self.before_first.pop(number, None)
        if request is None:
            return
        self.tokens -= request.tokens
        request.first_step = self.steps
        self.changes += 1
        if wait_s is not None:
            self.first_outputs += 1
            self.first_wait_s += wait_s
            self.ahead_tokens += request.ahead_tokens


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A model server as the scheduler sees it. A new one replaces it when something learned changes."""

    name: str
    slot: int
    """Small stable integer: its bit in the prefix index. Reused only after the endpoint has been removed."""
    address: str
    """``host:port``."""
    load: Load
    labels: Mapping[str, str] = {}
    weight: float = 1.0
    price_per_hour: float = 0.0
    """In the user's currency; 0.0 where nobody told."""
    watts: float = 0.0
    """Drawn while it works: read, else as typed; 0.0 where nobody told."""
    engine: str = ""
    models: frozenset[str] | None = None
    """Base models and LoRA adapters it serves; None until it has told."""
    metrics: Metrics = Metrics()


class Usage(msgspec.Struct, frozen=True, gc=False):
    """Token counts as the engine reported them; None where it did not say."""

    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None


class Ending(Enum):
    """How a request ended. Every request has exactly one."""

    OK = "ok"
    REFUSED = "refused"
    """We answered it ourselves: bad input, no endpoint, saturated."""
    ERROR = "error"
    """The endpoint answered with 4xx or 5xx."""
    FAILED = "failed"
    """The endpoint broke off, timed out, or could not be reached."""
    CANCELLED = "cancelled"
    """The client left."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a request; the observers get exactly one each."""

    ending: Ending
    status: int
    """HTTP status the client saw; 0 when it left before any."""
    endpoint: str = ""
    tries: int = 1
    decided_s: float = 0.0
    """From the request's arrival to the decision for ``endpoint``."""
    ttft_s: float | None = None
    """From the request's arrival to the first body byte of the response."""
    duration_s: float = 0.0
    chunks: int = 0
    request_bytes: int = 0
    response_bytes: int = 0
    usage: Usage = Usage()
    likely_tokens: float | None = None
    """Where the usage has no output tokens: how many there were, by how far others at the endpoint got."""
    reason: str = ""
    """Stable word for what went wrong; empty when nothing did."""


class Prediction(msgspec.Struct, frozen=True, gc=False):
    """What was expected of the chosen endpoint, seconds."""

    queue_s: float
    """Until the prompts before it are computed."""
    prefill_s: float
    """Its own, to the first token."""
    step_s: float
    """For each further token, as things stood."""


class Decision(msgspec.Struct):
    """Where a request goes, and everything needed to explain it afterwards. Complete once ``outcome`` is
    set.
    """

    request_id: str
    model: str
    at_s: float
    profile: str
    candidates: Sequence[Endpoint]
    chosen: Endpoint
    fallbacks: tuple[Endpoint, ...] = ()
    """Ordered alternatives, when the picker was asked for more than one endpoint."""
    kept: Mapping[str, Sequence[Endpoint]] = {}
    """Candidates left after each filter that removed some."""
    scores: Mapping[str, Sequence[float]] = {}
    """Per scorer, aligned with ``scored``."""
    weights: Mapping[str, float] = {}
    scored: Sequence[Endpoint] = ()
    matched_tokens: int = 0
    """Prompt tokens we believe the chosen endpoint holds in its prefix cache."""
    prompt_tokens: int = 0
    by_events: bool = False
    """``matched_tokens`` is what its engine told in KV events; else what was sent there tells."""
    untokenized: str = ""
    """Why the prompts' token ids, or their blocks in the shared index, were wanted and not known."""
    sent_tokens: int = 0
    """What ``matched_tokens`` would be by what was sent there alone."""
    request_headers: tuple[tuple[str, str], ...] = ()
    """Told to the endpoint, or to a sidecar before it."""
    response_headers: tuple[tuple[str, str], ...] = ()
    tried: tuple[str, ...] = ()
    """Endpoints that failed this request before ``chosen`` got it."""
    predicted: Prediction | None = None
    """By policies that predict."""
    outcome: Outcome | None = None
