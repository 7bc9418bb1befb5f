"""p2p-source-producer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, ClassVar, NamedTuple

from msgspec import Meta

from pointsman.prefix.approximate import PrefixMatch
from pointsman.prefix.precise import CPU
from pointsman.registry import Plugin, register
from pointsman.scheduling.cycle import Cycle
from pointsman.scheduling.signals import SENT, prefix_match
from pointsman.types import Decision, Endpoint

HEADER = "x-kv-cache-source-host-port"
"""Read by the sidecar of the endpoint that gets the request."""


class _Holder(NamedTuple):
    """An endpoint that others can pull blocks from."""

    endpoint: Endpoint
    tokens: int
    """Leading prompt tokens that can be had there."""
    block_tokens: int


@register("p2p-source-producer")
class P2PSource(Plugin):
    """Name, in the header x-kv-cache-source-host-port, an endpoint from which the chosen one can pull what it
    lacks of the prompt: at least ``minCachedTokenDelta`` tokens. It is drawn among those within a block of
    the most, with weight 1 / (1 + waiting requests). Of an endpoint that tells what it holds only blocks in
    CPU memory count: they are what others can pull.
    """

    prefix_match_info_producer_name: str = ""
    min_cached_token_delta: Annotated[int, Meta(ge=1)] = 1
    prefill_profile_name: str = "prefill"

    producers: ClassVar[Mapping[str, str]] = {"prefix_match_info_producer_name": SENT}
    unused: ClassVar[Mapping[str, str]] = {
        "prefillProfileName": "the endpoint that gets the request computes its prompt"
    }

    def on_dispatch(self, cycle: Cycle, decision: Decision) -> None:
        match = prefix_match(cycle, self.prefix_match_info_producer_name)
        if not match.held_by_slot:
            return
        holders = list(_holders(cycle, match))
        most = max((holder.tokens for holder in holders), default=0)
        near = [holder for holder in holders if holder.tokens + holder.block_tokens >= most]
        if not near:
            return
        (source,) = cycle.services.rng.choices(near, _weights(near))
        chosen = decision.chosen
        lacks = source.tokens - match.cached_tokens(chosen.slot)
        if source.endpoint.slot != chosen.slot and lacks >= self.min_cached_token_delta:
            decision.request_headers += ((HEADER, source.endpoint.address),)


def _holders(cycle: Cycle, match: PrefixMatch) -> Iterator[_Holder]:
    told = match.told
    in_cpu = told.tokens_in(CPU) if told is not None else {}
    for endpoint in cycle.candidates:
        slot = endpoint.slot
        if told is not None and slot in told.slots:
            tokens, block_tokens = in_cpu.get(slot, 0), told.block_tokens(slot)
        else:
            tokens, block_tokens = match.tokens(slot), cycle.services.prefix.block_tokens
        if tokens:
            yield _Holder(endpoint, tokens, block_tokens)


def _weights(holders: Sequence[_Holder]) -> list[float]:
    return [1.0 / (1.0 + holder.endpoint.metrics.waiting) for holder in holders]
