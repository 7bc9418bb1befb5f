"""Builders and fakes that our tests and plugin authors share. Imported by tests only."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from pointsman.prefix.approximate import PrefixIndex
from pointsman.scheduling.cycle import Cycle, Services
from pointsman.types import Endpoint, InferenceRequest, Load, Metrics, Prompt


def services(*, seed: int = 0, clock: Callable[[], float] = lambda: 0.0, **index: Any) -> Services:
    """Services with an empty prefix index, a seeded random source and a clock that stands still."""
    return Services(PrefixIndex(**index), clock, random.Random(seed))


def fleet(n: int | None = None, **columns: Sequence[Any]) -> list[Endpoint]:
    """Endpoints e0, e1, ... Each keyword is a column: a field of ``Endpoint`` or ``Metrics``, or the counters
    ``requests`` and ``tokens`` in flight. ``fleet(kv_usage=[.1, .9])`` makes two endpoints."""
    count = n if n is not None else len(next(iter(columns.values())))
    endpoints = []
    for i in range(count):
        row = {key: column[i] for key, column in columns.items()}
        load = Load()
        load.requests, load.tokens = row.pop("requests", 0), row.pop("tokens", 0)
        metrics = Metrics(**{k: row.pop(k) for k in list(row) if k in Metrics.__struct_fields__})
        row = {"name": f"e{i}", "address": f"10.0.0.{i + 1}:8000"} | row
        endpoints.append(Endpoint(slot=i, load=load, metrics=metrics, **row))
    return endpoints


def request(text: str = "", **fields: Any) -> InferenceRequest:
    """A completion request with ``text`` as its prompt, four bytes a token."""
    data = text.encode()
    tokens = (len(data) + 3) // 4
    prompts = (Prompt(data, tokens),) if data else ()
    defaults = {"id": "r1", "path": "/v1/completions", "format": "openai", "model": "m"}
    return InferenceRequest(**(defaults | {"prompts": prompts, "prompt_tokens": tokens} | fields))


def cycle(
    endpoints: Sequence[Endpoint], text: str = "", *, given: Services | None = None, **fields: Any
) -> Cycle:
    """A cycle over ``endpoints`` whose slots the prefix index knows."""
    with_index = given or services()
    for endpoint in endpoints:
        with_index.prefix.add(endpoint.slot)
    return Cycle(request(text, **fields), endpoints, with_index)
