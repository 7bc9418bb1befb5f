"""Where an endpoint publishes its KV events: what GET /kv_event_sources says of it, or the settings."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_address

import msgspec

from pointsman.config import KvEvents as Settings

MAX_RANKS = 256
"""A page that names more, or a higher one, is not believed."""
_WILDCARDS = frozenset({"*", "0.0.0.0", "::", "[::]", ""})


class SourceAddress(msgspec.Struct, frozen=True):
    """How to get at the events of one data-parallel rank."""

    rank: int
    address: str
    """For ZeroMQ to connect to; empty when the engine connects to us."""
    replay: str
    """Where missed messages can be had; empty: nowhere."""
    topic: str
    """What the topics of its messages begin with."""


class _Told(msgspec.Struct):
    endpoint: str = ""
    replay_endpoint: str | None = None
    topic: str = ""
    data_parallel_rank: int = 0
    enable_kv_cache_events: bool = True
    publisher: str | None = None


def told(page: bytes, host: str) -> list[SourceAddress] | None:
    """What the page says; [] when there are no events, None when it says nothing that we understand.

    vLLM 0.32 has the engine's configuration by rank. Other versions list what the publishers are bound to,
    with or without {"sources": ...} around it.
    """
    try:
        tree = msgspec.json.decode(page)
        if isinstance(tree, dict) and isinstance(tree.get("sources"), list):
            tree = tree["sources"]
        if isinstance(tree, list):
            return _resolved(msgspec.convert(tree, list[_Told]), host)
        return _configured(msgspec.convert(tree, dict[int, _Told], strict=False), host)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None


def configured(settings: Settings, host: str) -> list[SourceAddress]:
    """What the settings say of an endpoint at ``host`` that says nothing itself."""
    return [
        SourceAddress(
            rank,
            _tcp(host, settings.port + rank) if not settings.bind else "",
            _tcp(host, settings.replay_port + rank) if settings.replay_port else "",
            settings.topic,
        )
        for rank in range(settings.ranks)
    ]


def _resolved(entries: Sequence[_Told], host: str) -> list[SourceAddress]:
    return [
        SourceAddress(e.data_parallel_rank, _at(e.endpoint, host), _at(e.replay_endpoint, host), e.topic)
        for e in entries
        if _publishes(e.data_parallel_rank, e)
    ]


def _configured(by_rank: dict[int, _Told], host: str) -> list[SourceAddress]:
    """Ranks that are told the same address publish at its port plus their rank."""
    told = {rank: e for rank, e in by_rank.items() if _publishes(rank, e)}
    shared = len(told) > 1 and len({e.endpoint for e in told.values()}) == 1
    found = []
    for rank, e in sorted(told.items()):
        offset = rank if shared else 0
        address = _at(e.endpoint, host, offset) if _binds(e.endpoint) else ""
        found.append(SourceAddress(rank, address, _at(e.replay_endpoint, host, offset, ours=False), e.topic))
    return found


def _publishes(rank: int, e: _Told) -> bool:
    if not 0 <= rank < MAX_RANKS:
        raise ValueError(f"rank {rank}")
    return e.enable_kv_cache_events and e.publisher in (None, "zmq") and bool(e.endpoint)


def _binds(endpoint: str) -> bool:
    """vLLM's rule (facts 3), and 0.0.0.0, which nobody can connect to."""
    return any(mark in endpoint for mark in ("*", "::", "ipc://", "0.0.0.0"))


def _at(endpoint: str | None, host: str, offset: int = 0, *, ours: bool = True) -> str:
    """``endpoint`` as seen from here. ``ours`` false: the engine listens there, whatever the host in it."""
    scheme, _, rest = (endpoint or "").partition("://")
    if scheme == "ipc" and _loopback(host):
        return f"ipc://{rest}"
    where, _, port = rest.rpartition(":")
    if scheme != "tcp" or not port.isdecimal() or not 0 < int(port) + offset < 1 << 16:
        return ""
    if ours and where not in _WILDCARDS:
        return f"tcp://{where}:{int(port) + offset}"
    return _tcp(host, int(port) + offset)


def _tcp(host: str, port: int) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def _loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
