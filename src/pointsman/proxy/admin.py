"""The admin port: health, metrics, endpoints, caches, decisions. JSON, except for /metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any
from urllib.parse import parse_qs, unquote

import msgspec

from pointsman.config import Admin as AdminSettings
from pointsman.config import Endpoint as EndpointSettings
from pointsman.config import Server, Settings, convert, redacted
from pointsman.endpoints.pool import Member, Pool
from pointsman.endpoints.spending import KWH_J
from pointsman.endpoints.target import targets_of
from pointsman.errors import (
    BadRequest,
    Conflict,
    Forbidden,
    MethodNotAllowed,
    PathNotFound,
    PointsmanError,
    SettingsError,
)
from pointsman.observability.decisions import DecisionRing
from pointsman.observability.telemetry import Telemetry
from pointsman.predictor.learned import Learned
from pointsman.proxy.cache_truth.report import CacheReport
from pointsman.proxy.head import RequestHead
from pointsman.proxy.server import ClientConnection, listen
from pointsman.types import Clock, Endpoint

MAX_DECISIONS = 1000


class Admin:
    """Answers requests on the admin port (``server.Host``)."""

    def __init__(
        self,
        settings: Settings,
        pool: Pool,
        clock: Clock,
        telemetry: Telemetry,
        decisions: DecisionRing,
        settle: Callable[[], Awaitable[None] | None],
        ready: Callable[[], bool],
        learn: Callable[[Member], Awaitable[None]],
        learned: Callable[[Sequence[Endpoint]], Mapping[str, Learned]],
        cache: CacheReport,
    ) -> None:
        self.settings = Server()  # the limits of a port for clients will do
        self.clock = clock
        self.draining = False
        self.clients: set[ClientConnection] = set()
        self._all = settings
        self._pool = pool
        self._telemetry = telemetry
        self._decisions = decisions
        self._settle = settle
        self._ready = ready
        self._learn = learn
        self._learned = learned
        self._cache = cache
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> int:
        """Listen; returns the port."""
        settings: AdminSettings = self._all.admin
        self._server = await listen(self, settings.host, settings.port, "admin.port")
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def close(self) -> None:
        if self._server:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        for client in list(self.clients):
            client.abort()

    def begin(self, client: ClientConnection, head: RequestHead, body: bytes) -> None:
        settling = self._settle()  # what is over must be in what we tell
        if settling is None:
            self._answer(client, head, body)
        else:
            client.waiting = True
            self._start(self._answer_then(settling, client, head, body))

    async def _answer_then(
        self, settling: Awaitable[None], client: ClientConnection, head: RequestHead, body: bytes
    ) -> None:
        await settling
        client.waiting = False
        if not client.gone:
            self._answer(client, head, body)

    def _answer(self, client: ClientConnection, head: RequestHead, body: bytes) -> None:
        method = head.method.decode()
        if method == "GET" and head.path == "/metrics":
            text = b"text/plain; version=0.0.4; charset=utf-8"
            client.respond(200, self._telemetry.page(), "", text)
        else:
            try:
                status, tree = self._route(method, head, body)
            except PointsmanError as error:
                self.refuse(client, head, error)
                return
            client.respond(status, msgspec.json.format(msgspec.json.encode(tree)) + b"\n", "")
        client.exchange_done()

    def refuse(self, client: ClientConnection, head: RequestHead | None, error: PointsmanError) -> None:
        client.respond_error(error, head, "")
        client.exchange_done()

    def _route(self, method: str, head: RequestHead, body: bytes) -> tuple[int, Any]:
        if method != "GET" and "origin" in head.headers:
            raise Forbidden("A web page of somebody else's may not change anything here.")
        parts = [unquote(part) for part in head.path.strip("/").split("/")]
        query = parse_qs(head.url.partition(b"?")[2].decode("latin-1"))
        match (method, *parts):
            case ("GET", "healthz"):
                return 200, {"status": "ok"}
            case ("GET", "readyz"):
                ready = self._ready()
                return (200 if ready else 503), {"ready": ready}
            case ("GET", "endpoints"):
                return 200, {"endpoints": [self._describe(m) for m in self._pool.members.values()]}
            case ("POST", "endpoints"):
                return 201, self._describe(self._add(body))
            case ("GET", "endpoints", name):
                return 200, self._describe(self._member(name))
            case ("POST", "endpoints", name, ("drain" | "resume") as action):
                self._member(name)
                self._pool.drain(name, action == "drain")
                return 200, self._describe(self._member(name))
            case ("DELETE", "endpoints", name):
                return 200, self._remove(name)
            case ("GET", "cache"):
                return 200, self._cache.page()
            case ("GET", "decisions"):
                return 200, {"decisions": self._recent(query)}
            case ("GET", "settings"):
                return 200, redacted(self._all)
            case (
                _,
                ("healthz" | "readyz" | "endpoints" | "cache" | "decisions" | "settings" | "metrics"),
                *_,
            ):
                raise MethodNotAllowed(f"{method} {head.path} is not something this API does.")
        raise PathNotFound(
            "The admin API has /healthz, /readyz, /metrics, /endpoints, /cache, /decisions and /settings."
        )

    def _recent(self, query: dict[str, list[str]]) -> list[dict[str, Any]]:
        limit = query.get("limit", ["50"])[0]
        if not limit.isdecimal() or not 1 <= int(limit) <= MAX_DECISIONS:
            raise BadRequest(f"limit must be a number from 1 to {MAX_DECISIONS}.", param="limit")
        return self._decisions.recent(int(limit), query.get("request_id", [""])[0])

    def _member(self, name: str) -> Member:
        member = self._pool.members.get(name)
        if member is None:
            raise PathNotFound(f"There is no endpoint called {name}.")
        return member

    def _add(self, body: bytes) -> Member:
        try:
            settings = convert(msgspec.json.decode(body or b"{}"), EndpointSettings, "endpoint")
            target = targets_of(settings)[0]
        except msgspec.DecodeError as exc:
            raise BadRequest(
                f'The body must be a JSON object such as {{"url": "http://host:8000"}}: {exc}.'
            ) from exc
        except SettingsError as exc:
            raise BadRequest(exc.message) from exc
        if target.name in self._pool.members:
            raise Conflict(f"There is an endpoint called {target.name} already.")
        member = self._pool.add(target, "admin")
        self._start(_as_task(self._learn(member)))
        return member

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _remove(self, name: str) -> dict[str, Any]:
        member = self._member(name)
        if member.source == "file":
            raise Conflict(f"{name} comes from the watched file; take it out there, or drain it.")
        self._pool.remove(name)
        return {"removed": name}

    def _describe(self, member: Member) -> dict[str, Any]:
        endpoint = member.endpoint
        metrics = endpoint.metrics
        return {
            "name": endpoint.name,
            "url": member.target.settings.url,
            "source": member.source,
            "engine": endpoint.engine or None,
            "models": sorted(endpoint.models) if endpoint.models is not None else None,
            "labels": dict(endpoint.labels),
            "weight": endpoint.weight,
            "reached": member.reached,
            "draining": member.draining,
            "breaker": member.breaker.state.value,
            "in_flight": {"requests": endpoint.load.requests, "uncached_prompt_tokens": endpoint.load.tokens},
            "metrics": {
                "age_s": round(self.clock() - metrics.at_s, 3) if metrics.at_s else None,
                "waiting": metrics.waiting,
                "running": metrics.running,
                "kv_usage": metrics.kv_usage,
                "block_tokens": metrics.block_tokens or None,
                "kv_tokens": metrics.block_tokens * metrics.kv_blocks or None,
                "prefix_caching": metrics.prefix_caching,
                "loras_active": sorted(metrics.loras_active),
            },
            "cache": self._cache.line(endpoint.name),
            "cost": self._cost(member),
            "learned": _rounded(self._learned([endpoint]).get(endpoint.name)),
        }

    def _cost(self, member: Member) -> dict[str, float | None] | None:
        """Price and power since it joined, and our output tokens for them; None where neither is known."""
        spending = member.spending
        if not (spending.price_per_hour or spending.draw):
            return None
        spending.advance(self.clock())
        tokens, kwh = self._telemetry.output_tokens(member.endpoint.name), spending.energy_j / KWH_J
        return {
            "price_per_hour": spending.price_per_hour or None,
            "watts": spending.draw or None,
            "spent": _digits(spending.spent) if spending.price_per_hour else None,
            "kwh": _digits(kwh) if spending.draw else None,
            "output_tokens": tokens,
            "output_tokens_per_unit": _digits(tokens / spending.spent) if spending.spent else None,
            "output_tokens_per_kwh": _digits(tokens / kwh) if kwh else None,
        }


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def _rounded(learned: Learned | None) -> dict[str, float | None] | None:
    """To four digits: it is known no better."""
    if learned is None:
        return None
    fields: dict[str, float | None] = msgspec.to_builtins(learned)
    return {name: _digits(x) if isinstance(x, float) else x for name, x in fields.items()}


async def _as_task(work: Awaitable[None]) -> None:
    await work
