"""Engine constants of a live server, by some dozens of short requests.

Prefill: prompts it cannot know, alone, of several lengths. Their time to first token is a line whose slope
is the prefill speed. Decode: cached prompts, 1 to 32 at once, short and long. The time per token is
``base_s`` + ``sequence_s`` x sequences + ``context_token_s`` x tokens of context.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Sequence
from statistics import median
from urllib.request import urlopen

import msgspec

from pointsman.bench.client import Client, Record
from pointsman.bench.pace import Pace
from pointsman.bench.report import tpot_s
from pointsman.bench.text import text
from pointsman.bench.workloads import Call
from pointsman.endpoints.metrics.mapping import PageReader
from pointsman.endpoints.metrics.vllm import ENGINE
from pointsman.errors import SettingsError
from pointsman.sim.profiles import EngineParameters

PREFILL_TOKENS = (256, 1024, 2048, 4096)
DECODE = ((1, 128), (1, 4096), (8, 128), (8, 2048), (32, 128), (32, 2048))
"""Requests at once, and how long their prompts are."""
OUTPUT_TOKENS = 96
REPEATS = 3

_METRICS_TIMEOUT_S = 5.0


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What a probe cannot see."""

    kv_tokens: int
    block_tokens: int
    max_sequences: int
    step_tokens: int


class Constant(msgspec.Struct, frozen=True):
    """One constant and its standard error, from how far the points are from the line."""

    field: str
    value: float
    error: float


class Probed(msgspec.Struct, frozen=True, kw_only=True):
    """What the probe found."""

    parameters: EngineParameters
    constants: tuple[Constant, ...]
    prefill: tuple[tuple[float, float], ...]
    """Prompt tokens and time to first token [s]."""
    decode: tuple[tuple[int, float, float], ...]
    """Sequences, their tokens of context and time per token [s]."""


def kv_cache_of(url: str) -> tuple[int, int]:
    """Tokens of the server's KV cache and of one of its blocks, as its vLLM metrics page says; zeros where
    it does not.
    """
    try:
        with urlopen(url.rstrip("/").removesuffix("/v1") + "/metrics", timeout=_METRICS_TIMEOUT_S) as page:
            metrics, _ = PageReader(ENGINE).read(page.read(), 0.0)
    except (OSError, ValueError):
        return 0, 0
    return metrics.kv_blocks * metrics.block_tokens, metrics.block_tokens


async def probe(
    client: Client, pace: Pace, settings: Settings, on_step: Callable[[str], None] = lambda _: None
) -> Probed:
    """Ask the server, some dozens of requests one stage after the other."""
    rng = random.Random(f"probe {pace.now()}")  # prompts of an earlier probe may still be cached
    prefill: list[tuple[float, float]] = []
    for tokens in PREFILL_TOKENS:
        on_step(f"prefill of {tokens} tokens")
        prefill.append(await _prefill(client, pace, rng, tokens))
    decode: list[tuple[int, float, float]] = []
    for at_once, tokens in DECODE:
        on_step(f"{at_once} at once on {tokens} tokens")
        decode.append(await _decode(client, pace, rng, at_once, tokens))
    return fitted(prefill, decode, settings)


def fitted(
    prefill: Sequence[tuple[float, float]], decode: Sequence[tuple[int, float, float]], settings: Settings
) -> Probed:
    """The constants behind these points."""
    steps = [((1.0, float(n), context), seconds) for n, context, seconds in decode]
    (base_s, sequence_s, context_token_s), decode_errors = _least_squares(steps)
    lines = [((1.0, tokens), seconds) for tokens, seconds in prefill]
    (first_s, token_s), (first_error, token_error) = _least_squares(lines)
    if token_s <= 0 or base_s <= 0:
        raise SettingsError("--url: times do not grow with the work; is the server busy with others?")
    prefill_step_s = max(0.0, first_s - base_s)
    parameters = EngineParameters(
        base_s=base_s,
        sequence_s=max(0.0, sequence_s),
        context_token_s=max(0.0, context_token_s),
        prefill_tokens_per_s=1 / token_s,
        prefill_step_s=prefill_step_s,
        kv_tokens=settings.kv_tokens,
        max_sequences=settings.max_sequences,
        block_tokens=settings.block_tokens,
        step_tokens=settings.step_tokens,
    )
    base_error, sequence_error, context_error = decode_errors
    constants = (
        Constant("base_s", base_s, base_error),
        Constant("sequence_s", parameters.sequence_s, sequence_error),
        Constant("context_token_s", parameters.context_token_s, context_error),
        Constant("prefill_tokens_per_s", 1 / token_s, token_error / token_s**2),
        Constant("prefill_step_s", prefill_step_s, math.hypot(first_error, base_error)),
    )
    return Probed(parameters=parameters, constants=constants, prefill=tuple(prefill), decode=tuple(decode))


async def _prefill(client: Client, pace: Pace, rng: random.Random, tokens: int) -> tuple[float, float]:
    records = []
    for _ in range(REPEATS):
        call = Call(text(rng, tokens), tokens, 1)
        records.append(_good(await client.send(call, pace.now())))
    return (
        median(float(record.usage.prompt_tokens or tokens) for record in records),
        median(record.first_s - record.sent_s for record in records),
    )


async def _decode(
    client: Client, pace: Pace, rng: random.Random, at_once: int, tokens: int
) -> tuple[int, float, float]:
    """Sequences, tokens of their context in the middle of the answers, seconds a token."""
    prompt = text(rng, tokens)
    _good(await client.send(Call(prompt, tokens, 1), pace.now()))  # now it is cached
    call = Call(prompt, tokens, OUTPUT_TOKENS)
    records = await asyncio.gather(*(client.send(call, pace.now()) for _ in range(at_once)))
    counted = median(float(_good(record).usage.prompt_tokens or tokens) for record in records)
    times = [seconds for record in records if (seconds := tpot_s(record)) is not None]
    if not times:
        raise SettingsError("--url: answers come in one piece; a stream of tokens is needed")
    return at_once, at_once * (counted + OUTPUT_TOKENS / 2), median(times)


def _good(record: Record) -> Record:
    if record.error:
        raise SettingsError(f"--url: a request failed: {record.error} {record.detail}".rstrip())
    return record


def _least_squares(points: Sequence[tuple[tuple[float, ...], float]]) -> tuple[list[float], list[float]]:
    """Coefficients for which rows x coefficients come closest to the values in relative terms, and their
    standard errors.
    """
    weighted = [([x / value for x in row], 1.0) for row, value in points]
    size = len(points[0][0])
    normal = [[sum(r[i] * r[j] for r, _ in weighted) for j in range(size)] for i in range(size)]
    right = [sum(r[i] * y for r, y in weighted) for i in range(size)]
    inverse = _inverse(normal)
    found = [sum(a * b for a, b in zip(row, right, strict=True)) for row in inverse]
    misses = [y - sum(a * b for a, b in zip(r, found, strict=True)) for r, y in weighted]
    variance = sum(miss * miss for miss in misses) / max(1, len(points) - size)
    return found, [math.sqrt(max(0.0, variance * inverse[i][i])) for i in range(size)]


def _inverse(matrix: Sequence[Sequence[float]]) -> list[list[float]]:
    """Of a symmetric positive matrix, by Gauss and Jordan; scaled first, as columns differ by 1e5."""
    size = len(matrix)
    scale = [1 / math.sqrt(matrix[i][i]) for i in range(size)]
    rows = [
        [matrix[i][j] * scale[i] * scale[j] for j in range(size)] + [float(i == j) for j in range(size)]
        for i in range(size)
    ]
    for i in range(size):
        pivot = rows[i][i]
        rows[i] = [value / pivot for value in rows[i]]
        for j in range(size):
            if j != i:
                factor = rows[j][i]
                rows[j] = [a - factor * b for a, b in zip(rows[j], rows[i], strict=True)]
    return [[rows[i][size + j] * scale[i] * scale[j] for j in range(size)] for i in range(size)]
