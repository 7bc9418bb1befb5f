"""What was learned, as it is kept over a restart: structs, and the bytes of a small file.

It names endpoints and engines, and nothing that clients sent: models, tenants and prompts are hashes.
The first line says what the file is; a hash in it tells a whole file from a damaged one.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from msgspec.structs import astuple
from xxhash import xxh3_64_hexdigest

from pointsman.errors import PointsmanError
from pointsman.predictor.survival import Bin

FORMAT = "pointsman learned"
VERSION = 1
MAX_KINDS = 128
MAX_MODELS = 32
"""More are not kept, so that the file is small: less than 100 KB with 1,000 endpoints."""
DIGITS = 7


class FitState(msgspec.Struct, array_like=True):
    """A fit of step times (``fit.StepFit``)."""

    gram: tuple[float, ...]
    """Upper triangle, row by row."""
    moment: tuple[float, ...]
    weight_s: float


class PrefillState(msgspec.Struct, array_like=True):
    seconds: float
    tokens: float


class KindState(msgspec.Struct, forbid_unknown_fields=True):
    """Endpoints that are alike, and what is known of all of them."""

    engine: str
    block_tokens: int
    kv_blocks: int
    models: tuple[int, ...]
    """Hashes of all that they serve; empty where they have not told."""
    fit: FitState
    prefill: PrefillState


class FactorState(msgspec.Struct, array_like=True):
    """How an endpoint differs from its siblings, as logarithms."""

    name: str
    kind: int
    """Its place among the kinds."""
    drift: float
    drift_weight_s: float
    said: float


class SpeedsState(msgspec.Struct, forbid_unknown_fields=True):
    pool: FitState
    prefill: PrefillState
    kinds: tuple[KindState, ...] = ()
    endpoints: tuple[FactorState, ...] = ()


class TableState(msgspec.Struct, array_like=True):
    """Lengths of one sort of answers (``survival.Table``), by the hash of what sort that is."""

    key: int
    parent: int
    """0: the pool's."""
    limit: float
    bins: dict[int, Bin]


class LengthsState(msgspec.Struct, forbid_unknown_fields=True):
    pool: dict[int, Bin] = {}
    levels: tuple[TableState, ...] = ()
    groups: tuple[TableState, ...] = ()
    """Least recently answered first."""


class Kept(msgspec.Struct, forbid_unknown_fields=True):
    """What a policy has learned."""

    speeds: SpeedsState
    lengths: LengthsState = msgspec.field(default_factory=LengthsState)
    numbers: dict[str, float] = {}
    """Of the policy's own, by name."""


class State(msgspec.Struct, forbid_unknown_fields=True):
    """All of it."""

    saved_at_s: float
    """On the wall's clock, seconds since 1970."""
    kept: Kept


class _Head(msgspec.Struct):
    format: str
    version: int
    xxh3: str


class StateError(PointsmanError):
    """These bytes are no state that can be taken up."""

    reason = "bad_state"


def encode(state: State) -> bytes:
    body = msgspec.json.encode(state)
    head = msgspec.json.encode(_Head(FORMAT, VERSION, xxh3_64_hexdigest(body)))
    return head + b"\n" + body + b"\n"


def decode(data: bytes) -> State:
    """``StateError`` says why not."""
    line, _, body = data.partition(b"\n")
    try:
        head = msgspec.json.decode(line, type=_Head)
    except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
        raise StateError("is not a file of what was learned") from exc
    if head.format != FORMAT:
        raise StateError("is not a file of what was learned")
    if head.version != VERSION:
        raise StateError(f"is of version {head.version}; this program reads version {VERSION}")
    body = body.rstrip(b"\n")
    if xxh3_64_hexdigest(body) != head.xxh3:
        raise StateError("is damaged")
    try:
        return msgspec.json.decode(body, type=State)
    except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
        raise StateError(f"is damaged: {exc}") from exc


def rounded(value: float) -> float:
    """As exact as it is kept."""
    return float(f"{value:.{DIGITS}g}")


def bins_state(bins: Mapping[int, Bin]) -> dict[int, Bin]:
    """Copies of these bins, as exact as they are kept."""
    return {k: Bin(*(rounded(x) for x in astuple(found))) for k, found in bins.items()}
