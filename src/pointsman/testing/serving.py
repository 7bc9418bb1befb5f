"""The gateway in this process, in front of whatever a test wants, and what its admin port says."""

from __future__ import annotations

import io
import json
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from pointsman.config import Settings, convert
from pointsman.proxy.application import Application
from pointsman.testing.client import RawClient, Response, message
from pointsman.testing.upstream import FakeUpstream
from pointsman.types import Clock

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "server": {"host": "127.0.0.1", "port": 0, "drain_s": 1.0},
    "admin": {"port": 0},
    "scheduling": {"preset": "round-robin", "seed": 1},
    "kv_events": {"mode": "none"},  # so that nothing but the test's requests and probes comes to an upstream
}


def settings(*endpoints: FakeUpstream | str | Mapping[str, Any], **sections: Mapping[str, Any]) -> Settings:
    """Settings for free ports on loopback; ``sections`` as in the settings file."""
    listed = [e if isinstance(e, Mapping) else {"url": e if isinstance(e, str) else e.url} for e in endpoints]
    tree = {name: {**DEFAULTS.get(name, {}), **sections.get(name, {})} for name in {*DEFAULTS, *sections}}
    return convert({"endpoints": listed, **tree}, Settings, "test")


@asynccontextmanager
async def serving(
    *endpoints: FakeUpstream | str | Mapping[str, Any],
    out: io.StringIO | None = None,
    clock: Clock = time.monotonic,
    **sections: Mapping[str, Any],
) -> AsyncIterator[Application]:
    """The gateway, listening until the block ends; ``out`` gets its request log."""
    application = Application(settings(*endpoints, **sections), clock, out or io.StringIO())
    failed: BaseException | None = None
    async with application.running():
        try:
            yield application
        except BaseException as error:  # a failed test is to be seen as it failed, after a clean stop
            failed = error
    if failed is not None:
        raise failed


async def admin(app: Application, path: str, method: str = "GET", body: object = None) -> Response:
    """A call of the admin API."""
    async with RawClient(app.admin_port) as client:
        return await client.ask(message(method, path, body, "connection: close"))


async def endpoints(app: Application) -> dict[str, dict[str, Any]]:
    """What the admin API says of each endpoint, by name."""
    answer = json.loads((await admin(app, "/endpoints")).body)
    return {endpoint["name"]: endpoint for endpoint in answer["endpoints"]}


async def in_flight(app: Application) -> int:
    """Requests in flight plus uncached prompt tokens in flight, over all endpoints."""
    counts = [endpoint["in_flight"] for endpoint in (await endpoints(app)).values()]
    assert all(value >= 0 for count in counts for value in count.values()), counts
    return sum(count["requests"] + count["uncached_prompt_tokens"] for count in counts)


_LINE = re.compile(r'^pointsman_requests_total\{.*ending="(\w+)".*\} (\S+)$', re.MULTILINE)


async def endings(app: Application) -> Counter[str]:
    """How many requests ended in which way, as /metrics counts them."""
    page = (await admin(app, "/metrics")).body.decode()
    found: Counter[str] = Counter()
    for ending, count in _LINE.findall(page):
        found[ending] += int(float(count))
    return found


async def until(holds: Callable[[], Awaitable[bool]], tries: int = 500) -> None:
    """Ask again and again; each ask is a round trip, which lets everybody else go on."""
    for _ in range(tries):
        if await holds():
            return
    raise AssertionError("it never came to hold")
