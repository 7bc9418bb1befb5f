"""encode-filter, prefill-filter and decode-filter: keep the endpoints whose role label says they do that
stage.
"""

from __future__ import annotations

from collections.abc import Sequence

from pointsman.registry import Plugin, register
from pointsman.scheduling.cycle import Cycle
from pointsman.types import ROLE_LABEL, Endpoint

ENCODE = frozenset({"encode", "encode-prefill", "encode-prefill-decode"})
PREFILL = frozenset({"prefill", "encode-prefill", "prefill-decode", "both", "encode-prefill-decode"})
DECODE = frozenset({"decode", "prefill-decode", "both", "encode-prefill-decode"})


def _keep(cycle: Cycle, roles: frozenset[str], unlabelled: str) -> Sequence[Endpoint]:
    return [e for e in cycle.endpoints if e.labels.get(ROLE_LABEL, unlabelled) in roles]


@register("encode-filter")
class EncodeFilter(Plugin):
    """Keep endpoints that encode media; one without a role does not."""

    def filter(self, cycle: Cycle) -> Sequence[Endpoint]:
        return _keep(cycle, ENCODE, "")


@register("prefill-filter")
class PrefillFilter(Plugin):
    """Keep endpoints that prefill; one without a role does not."""

    def filter(self, cycle: Cycle) -> Sequence[Endpoint]:
        return _keep(cycle, PREFILL, "")


@register("decode-filter")
class DecodeFilter(Plugin):
    """Keep endpoints that decode; one without a role does."""

    def filter(self, cycle: Cycle) -> Sequence[Endpoint]:
        return _keep(cycle, DECODE, "decode")
