"""What may be wrong where predictions and reports differ, as far as it can be seen from here.

Each cause is a function of the evidence to a sentence for people, empty where it does not apply.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import msgspec

from pointsman.prefix.kv_source import KvEventSource
from pointsman.proxy.cache_truth.counts import Record
from pointsman.proxy.cache_truth.spans import Span
from pointsman.types import Metrics

SILENT_S = 5.0
"""An engine that has computed a prompt has told of its blocks by then: vLLM's last events come 18 ms after
the answer.
"""
THOUSANDS = 2000
"""Prompt tokens that were predicted to be cached, and none were: no accident."""
FEW = 8
"""Requests that must agree in what they say."""
AGAIN_AND_AGAIN = 3
"""Times within a minute that numbers begin anew: no engine restarts so often."""


class Evidence(msgspec.Struct, kw_only=True, gc=False):
    """What is known of one endpoint."""

    metrics: Metrics
    block_tokens: int
    """As its events say; 0 where none have come."""
    sources: Sequence[KvEventSource]
    events: Record
    """Requests whose prediction went by events."""
    sent: Record
    """And the others."""
    span: Span | None
    """The last that was compared with the engine's counters."""
    set_aside: str
    """Why its events are not gone by; empty: they are."""
    silent_s: float
    """Since it has answered a prompt that nothing has been told of; 0.0: there is none."""
    losses: int
    """Of the last minute: gaps and replays that could not be filled."""
    restarts: int
    """Of the last minute: numbers that came again."""
    unreadable: int
    """Of the last minute: messages and events."""


def _prefix_caching_off(found: Evidence) -> str:
    if found.metrics.prefix_caching is not False or not (_expected(found) or found.sources):
        return ""
    return "its metrics page says that prefix caching is off: every prompt is computed anew"


def _no_events(found: Evidence) -> str:
    sources = found.sources
    if not sources or found.silent_s < SILENT_S or found.metrics.prefix_caching is False:
        return ""
    begin = "it computes prompts and no KV events come"
    away = [source for source in sources if not source.connected]
    if away and not any(source.frames for source in sources):
        if not away[0].address:
            return f"{begin}: its engine has not connected to kv_events.bind; can it reach that port?"
        return f"{begin}: nobody answers at {away[0].address}; is that port open?"
    if not any(source.frames for source in sources):
        return (
            f"{begin}, though {sources[0].address} is connected; does the engine publish "
            "(vLLM: enable_kv_cache_events), and do its topics begin with kv_events.topic?"
        )
    return f"{begin} any more: has its publisher stopped, or is the way to it cut?"


def _block_size(found: Evidence) -> str:
    page = found.metrics.block_tokens
    if not page or not found.block_tokens or page == found.block_tokens:
        return ""
    return (
        f"its events tell of blocks of {found.block_tokens} tokens, its metrics page of {page}: "
        "is another engine publishing at its address?"
    )


def _nothing_cached(found: Evidence) -> str:
    if found.metrics.prefix_caching is False or not _expected(found):
        return ""
    tokens = _predicted(found)
    return (
        f"{tokens:,} prompt tokens were predicted to be cached and it reports none: was its cache reset, "
        "or is prefix caching off for these requests?"
    )


def _expected(found: Evidence) -> bool:
    """Thousands were, and nothing came."""
    return _predicted(found) >= THOUSANDS


def _predicted(found: Evidence) -> int:
    """Tokens, of those who report nothing."""
    total = 0
    for record in (found.events, found.sent):
        if record.reported_tokens:
            return 0
        total += record.predicted_tokens if record.requests >= FEW else 0
    if not total and found.span is not None and not found.span.reported:
        total = found.span.predicted
    return total


def _tokens_differ(found: Evidence) -> str:
    events = found.events
    if events.requests < FEW or 2 * events.unlike <= events.requests:
        return ""
    return (
        f"it counts other prompt tokens than we in {events.unlike} of the last {events.requests} requests: "
        "its chat template or tokenizer is not the one of tokens.models or tokens.url"
    )


def _events_set_aside(found: Evidence) -> str:
    return f"its KV events are set aside: {found.set_aside}" if found.set_aside else ""


def _events_lost(found: Evidence) -> str:
    if not found.losses:
        return ""
    replay = any(source.replay for source in found.sources)
    why = "its replays do not have them" if replay else "it offers no replays (vLLM: replay_endpoint)"
    return f"KV events were missed {found.losses} times within a minute, and {why}"


def _events_renumbered(found: Evidence) -> str:
    if found.restarts < AGAIN_AND_AGAIN:
        return ""
    return (
        f"the numbers of its KV events began anew {found.restarts} times within a minute: "
        "do two engines publish at one address, or does it restart again and again?"
    )


def _events_unreadable(found: Evidence) -> str:
    if not found.unreadable:
        return ""
    return f"{found.unreadable} KV events within a minute could not be read: is it a layout we do not know?"


CAUSES: Mapping[str, Callable[[Evidence], str]] = {
    "prefix-caching-off": _prefix_caching_off,
    "no-events": _no_events,
    "block-size": _block_size,
    "nothing-cached": _nothing_cached,
    "tokens-differ": _tokens_differ,
    "events-lost": _events_lost,
    "events-renumbered": _events_renumbered,
    "events-unreadable": _events_unreadable,
    "events-set-aside": _events_set_aside,
}
"""By name, the likeliest to explain others first."""


def causes(found: Evidence) -> dict[str, str]:
    """What applies, by name."""
    return {name: says for name, cause in CAUSES.items() if (says := cause(found))}
