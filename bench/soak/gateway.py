"""The router of a soak, in a process of its own, and what its admin port says."""

import contextlib
import re
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from .client import call
from .process import Process, running

INDEX_BYTES = 2 << 20
"""The prefix index's bound: small, so that it is reached and its evictions run."""
SETTINGS = (
    "upstream.first_byte_timeout_s=2",
    "upstream.between_bytes_timeout_s=2",
    "upstream.connect_timeout_s=0.5",
    "log.requests=false",
    "server.endpoint_header=true",
    f"prefix.max_bytes={INDEX_BYTES}",
)
_SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


@dataclass
class View:
    """The admin port's page and list, read at one time."""

    endings: Counter[str] = field(default_factory=Counter)
    """Requests by how they ended."""
    in_flight: dict[str, float] = field(default_factory=dict)
    """Requests plus uncached tokens, by endpoint: on /metrics."""
    listed: dict[str, dict[str, Any]] = field(default_factory=dict)
    """/endpoints, by name."""
    index_bytes: float = 0.0
    retries: float = 0.0


@dataclass
class Trace:
    """A request as the router remembers it."""

    tried: list[str] = field(default_factory=list)
    """The endpoints that had it, in order."""
    begun: bool = False
    """Bytes of an answer went to the client."""
    outcome: dict[str, Any] = field(default_factory=dict)


@dataclass
class Gateway:
    process: Process
    port: int
    admin_port: int

    async def view(self) -> View:
        view = view_of((await call(self.admin_port, "GET", "/metrics")).decode())
        answer = msgspec.json.decode(await call(self.admin_port, "GET", "/endpoints"))
        view.listed = {endpoint["name"]: endpoint for endpoint in answer["endpoints"]}
        return view

    async def trace(self, request_id: str) -> Trace:
        """What the router tells of this request, as long as it remembers it."""
        answer = msgspec.json.decode(
            await call(self.admin_port, "GET", f"/decisions?request_id={request_id}&limit=1")
        )
        for told in answer["decisions"]:
            outcome = told["outcome"]
            return Trace([*told["tried_before"], told["chosen"]], outcome["ttft_s"] is not None, outcome)
        return Trace()


def view_of(page: str) -> View:
    """What a /metrics page says."""
    view = View()
    for name, labels, text in _SAMPLE.findall(page):
        of, value = dict(_LABEL.findall(labels)), float(text)
        if name == "pointsman_requests_total":
            view.endings[of["ending"]] += int(value)
        elif name in ("pointsman_inflight_requests", "pointsman_inflight_uncached_tokens"):
            view.in_flight[of["endpoint"]] = view.in_flight.get(of["endpoint"], 0.0) + abs(value)
        elif name == "pointsman_prefix_index_bytes":
            view.index_bytes = value
        elif name == "pointsman_retries_total":
            view.retries += value
    return view


@contextlib.asynccontextmanager
async def gateway(urls: Sequence[str], settings: Sequence[str], out: Path) -> AsyncIterator[Gateway]:
    """``pointsman serve`` in front of ``urls``; ``settings`` come after ours."""
    sets = [part for setting in (*SETTINGS, *settings) for part in ("--set", setting)]
    args = ["serve", *urls, "--host", "127.0.0.1", "--port", "0", "--admin-port", "0", *sets]
    async with running("router", args, out / "router.log") as process:
        text = await process.says("^try: curl")
        ports = [re.search(p, text) for p in (r"base URL: http://[^:]+:(\d+)", r"admin: +http://[^:]+:(\d+)")]
        port, admin_port = (int(found[1]) for found in ports if found)
        yield Gateway(process, port, admin_port)
