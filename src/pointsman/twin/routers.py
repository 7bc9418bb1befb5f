"""The routers in front of a simulated fleet: how many, and what they get to see."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from pointsman.endpoints.pool import Pool
from pointsman.prefix.approximate import PrefixIndex
from pointsman.prefix.follow import follow
from pointsman.prefix.precise import PreciseIndex
from pointsman.router import Observer, Router
from pointsman.scheduling.cycle import Services
from pointsman.scheduling.presets import build_scheduler
from pointsman.scheduling.scheduler import Scheduler
from pointsman.twin.events import Events
from pointsman.twin.kv_events import Wires
from pointsman.twin.policies import Policy

Seconds = Annotated[float, Meta(ge=0)]


class Routers(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Several routers share the requests at random and know nothing of each other but what the endpoints'
    metrics say. By default there is one, which sees everything.
    """

    replicas: Annotated[int, Meta(ge=1)] = 1
    """So many, each with a prefix index and counters of its own."""
    view_s: Seconds = 0.0
    """Metrics are so old when they come. What a router sends itself it knows at once."""
    evidence: Literal["full", "picker"] = "full"
    """`picker`: responses go past the router, so first tokens, usage and bytes are not seen; only that a
    request has ended, and the metrics.
    """
    completion_delay_s: Seconds = 0.0
    """With `picker`: a request's end is told so late, as by an access log."""


class Replica(msgspec.Struct, frozen=True):
    """One router and its view of the endpoints."""

    pool: Pool
    router: Router
    scheduler: Scheduler


def build(
    routers: Routers,
    policy: Policy,
    events: Events,
    observers: Sequence[Observer],
    dice: Sequence[random.Random],
    prefix_block_tokens: int,
    wires: Wires | None = None,
) -> list[Replica]:
    """What ``pointsman serve`` builds, once for each of the ``dice``. Over ``wires`` come KV events, if
    any.
    """
    found = []
    for rng in dice:
        pool, index = Pool(events.clock), PrefixIndex()
        precise = PreciseIndex() if wires else None
        follow(index, pool, fixed_block_tokens=prefix_block_tokens, precise=precise)
        if wires and precise:
            wires.follow(pool, precise)
        scheduler = build_scheduler(policy.load(), Services(index, events.clock, rng, precise))
        sees = routers.evidence == "full"
        found.append(Replica(pool, Router(pool, scheduler, observers, sees_responses=sees), scheduler))
    return found
