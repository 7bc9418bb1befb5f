"""Facts about a cycle that several plugins need. Each is computed at most once, by ``cycle.get(signal)``."""

from __future__ import annotations

from pointsman.prefix.approximate import PrefixMatch
from pointsman.scheduling.cycle import Cycle


def prefix_match(cycle: Cycle) -> PrefixMatch:
    """What each endpoint is believed to hold of this request's prompts."""
    return cycle.services.prefix.match(cycle.request)
