"""The data plane put together: what the connections of clients and endpoints share."""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from collections.abc import Awaitable, Callable

import msgspec

from pointsman.config import Settings
from pointsman.endpoints.pool import Pool
from pointsman.errors import ModelNotFound, PathNotFound, PointsmanError, SettingsError
from pointsman.proxy.exchange import Exchange
from pointsman.proxy.head import RequestHead
from pointsman.proxy.paths import PathPolicy
from pointsman.proxy.server import ClientConnection
from pointsman.proxy.upstream import Connections, ResponseHead, UpstreamConnection
from pointsman.router import Flight, Router
from pointsman.types import Clock, Ending, Endpoint, InferenceRequest, Outcome

log = logging.getLogger(__name__)

SWEEP_S = 0.25
MAX_ID_BYTES = 128
MODEL_REWRITE = ("x-llm-d-model-name-rewrite", "x-gateway-model-name-rewrite")


class Gateway:
    """Takes complete requests from client connections and sees them through."""

    def __init__(
        self,
        settings: Settings,
        pool: Pool,
        router: Router,
        clock: Clock,
        refresh_models: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self.settings = settings
        self.pool = pool
        self.router = router
        self.clock = clock
        self.draining = False
        self.clients: set[ClientConnection] = set()
        self.active: set[Exchange] = set()
        self._refresh_models = refresh_models
        self._waiting: set[asyncio.Task[None]] = set()
        self._paths = PathPolicy(settings.server.allow_paths)
        self._connections: dict[str, Connections] = {}
        self._id_prefix = os.urandom(8).hex()
        self._id = 0
        self._server: asyncio.Server | None = None
        pool.listen(self._on_pool)

    # -- life

    async def start(self) -> int:
        """Listen; returns the port."""
        server = self.settings.server
        tls = server_tls(server.tls_cert, server.tls_key) if server.tls_cert else None
        self._server = await asyncio.get_running_loop().create_server(
            lambda: ClientConnection(self), server.host, server.port, ssl=tls, backlog=4096
        )
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def run(self) -> None:
        """Watch the deadlines, until cancelled."""
        while True:
            await asyncio.sleep(SWEEP_S)
            now = self.clock()
            for exchange in list(self.active):
                exchange.check(now)
            for client in list(self.clients):
                client.check(now)

    async def drain(self) -> None:
        """Take no new connections, let running requests end for ``drain_s``, then cut what is left."""
        self.draining = True
        if self._server:
            self._server.close()
        deadline = self.clock() + self.settings.server.drain_s
        for client in list(self.clients):
            client.drain()
        while (self.active or self._waiting) and self.clock() < deadline:  # noqa: ASYNC110 - bounded by drain_s
            await asyncio.sleep(0.02)
        if self.active:
            log.warning("stopping with %d requests unfinished", len(self.active))
        for task in self._waiting:
            task.cancel()
        for client in list(self.clients):
            client.abort()
        for connections in self._connections.values():
            connections.close()

    def _on_pool(self, event: str, endpoint: Endpoint) -> None:
        if event == "left":
            connections = self._connections.pop(endpoint.name, None)
            if connections:
                connections.close()

    def connections(self, name: str) -> Connections | None:
        """The connections to an endpoint; None when it has left the pool."""
        found = self._connections.get(name)
        if found is None and name in self.pool.members:
            upstream = self.settings.upstream
            target = self.pool.members[name].target
            found = Connections(target, upstream.connect_timeout_s, upstream.idle_s, self.clock)
            self._connections[name] = found
        return found

    # -- requests

    def request_id(self, head: RequestHead | None) -> str:
        """The client's ``x-request-id`` if it is a sane one, else a new one."""
        given = head.headers.raw.get(b"x-request-id") if head else None
        if given and len(given) <= MAX_ID_BYTES and given.isascii() and given.decode().isprintable():
            return given.decode()
        self._id += 1
        return f"{self._id_prefix}{self._id:08x}"

    def begin(self, client: ClientConnection, head: RequestHead, body: bytes) -> None:
        """A complete request has arrived."""
        request_id = self.request_id(head)
        path = head.path
        started_at = self.clock()
        try:
            if self._answer_here(client, head, request_id):
                return
            if not self._paths.passes(path):
                raise PathNotFound(f"The path {path} is not served here.")
            request = self.router.parse(request_id, path, head.headers, body)
            request = _rewritten(request)
            try:
                flight = self.router.open(request)
            except ModelNotFound:
                if self._refresh_models is None:
                    raise
                self._look_again(client, head, request, started_at)
                return
        except PointsmanError as error:
            self.refuse(client, path, request_id, error, self.clock() - started_at)
            return
        self._fly(client, head, request, flight, started_at)

    def _fly(
        self,
        client: ClientConnection,
        head: RequestHead,
        request: InferenceRequest,
        flight: Flight,
        started_at: float,
    ) -> None:
        exchange = Exchange(self, client, head, request, flight, started_at)
        self.active.add(exchange)
        client.exchange = exchange
        exchange.send()

    def refuse(
        self,
        client: ClientConnection,
        path: str,
        request_id: str,
        error: PointsmanError,
        duration_s: float = 0.0,
    ) -> None:
        """Answer with an error of our own."""
        request = InferenceRequest(id=request_id, path=path, format="")
        outcome = Outcome(
            ending=Ending.REFUSED, status=error.status, tries=0, duration_s=duration_s, reason=error.reason
        )
        self.router.observe(request, None, outcome)
        client.respond_error(error, path, request_id)
        client.exchange_done()

    def _look_again(
        self, client: ClientConnection, head: RequestHead, request: InferenceRequest, started_at: float
    ) -> None:
        """The model may have been loaded a moment ago: ask the endpoints before saying that it does not
        exist.
        """
        client.waiting = True

        async def look() -> None:
            assert self._refresh_models
            await self._refresh_models()
            client.waiting = False
            if client.gone:
                return
            try:
                flight = self.router.open(request)
            except PointsmanError as error:
                self.refuse(client, head.path, request.id, error, self.clock() - started_at)
                return
            self._fly(client, head, request, flight, started_at)

        task = asyncio.get_running_loop().create_task(look())
        self._waiting.add(task)
        task.add_done_callback(self._waiting.discard)

    def ended(self, exchange: Exchange, outcome: Outcome) -> None:
        self.active.discard(exchange)
        self.router.close(exchange.flight, outcome)

    # -- heads

    def forwarded_head(self, exchange: Exchange, connection: UpstreamConnection) -> bytes:
        """The request head for the endpoint."""
        head, request = exchange.request_head, exchange.request
        connections = connection.connections
        lines = head.lines
        if connections.overrides:
            lines = [x for x in lines if x.partition(b":")[0].strip().lower() not in connections.overrides]
        parts = [
            head.method
            + b" "
            + connections.prefix
            + head.url
            + b" HTTP/1.1\r\n"
            + connections.head_lines[:-2],
            *lines,
            b"x-request-id: " + request.id.encode("latin-1"),
            exchange.forwarded_for(),
        ]
        if head.upgrade:
            parts.append(b"connection: upgrade\r\nupgrade: " + head.upgrade)
        if request.body or head.body_bytes or head.chunked or head.method in (b"POST", b"PUT", b"PATCH"):
            parts.append(b"content-length: %d" % len(request.body))
        parts.append(b"\r\n")
        return b"\r\n".join(parts)

    def relayed_head(self, exchange: Exchange, head: ResponseHead) -> bytes:
        """The response head for the client: the endpoint's, without what speaks of its own connection."""
        raw, lower = head.raw, head.lower
        if (
            b"\r\nconnection:" in lower
            or b"\r\nx-request-id:" in lower
            or b"\r\nkeep-alive:" in lower
            or exchange.request_head.http10
        ):
            raw = _without(
                raw, _RESPONSE_DROPPED | ({b"transfer-encoding"} if exchange.request_head.http10 else set())
            )
        if raw.startswith(b"HTTP/1.0"):
            raw = b"HTTP/1.1" + raw[8:]
        extra = b"\r\nx-request-id: " + exchange.request.id.encode("latin-1")
        decision = exchange.flight.decision
        assert decision
        for name, value in decision.response_headers:
            extra += f"\r\n{name}: {value}".encode("latin-1")
        if self.settings.server.endpoint_header:
            extra += f"\r\nx-pointsman-endpoint: {decision.chosen.name}".encode("latin-1")
        if head.status == 101:
            extra += b"\r\nconnection: upgrade"
        elif exchange.closes_client(head):
            extra += b"\r\nconnection: close"
        return raw + extra + b"\r\n\r\n"

    def early_head(self, exchange: Exchange) -> bytes:
        """The head of a stream that we begin before the endpoint does."""
        return (
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
            b"cache-control: no-cache\r\ntransfer-encoding: chunked\r\nx-request-id: %b\r\n\r\n"
            % exchange.request.id.encode("latin-1")
        )

    # -- what we answer ourselves

    def _answer_here(self, client: ClientConnection, head: RequestHead, request_id: str) -> bool:
        if head.method != b"GET":
            return False
        path = head.path
        if path in ("/health", "/ping"):
            ready = self.pool.ready and not self.draining
            client.respond(200 if ready else 503, b"{}", request_id)
        elif path == "/v1/models":
            body = msgspec.json.encode({"object": "list", "data": self._models()})
            client.respond(200, body, request_id)
        elif path.startswith("/v1/models/"):
            name = path.removeprefix("/v1/models/")
            found = next((m for m in self._models() if m.get("id") == name), None)
            if found is None:
                raise ModelNotFound(name, self.pool.models())
            client.respond(200, msgspec.json.encode(found), request_id)
        else:
            return False
        client.exchange_done()
        return True

    def _models(self) -> list[dict[str, object]]:
        """The union of what the endpoints serve, each model as the first endpoint describes it."""
        union: dict[object, dict[str, object]] = {}
        for member in self.pool.members.values():
            for entry in member.models_detail:
                union.setdefault(entry.get("id"), entry)
        return list(union.values())


_RESPONSE_DROPPED = frozenset((b"connection", b"keep-alive", b"proxy-connection", b"x-request-id"))
_RESPONSE_DROPPED_10 = _RESPONSE_DROPPED | {b"transfer-encoding"}


def _without(raw: bytes, names: frozenset[bytes]) -> bytes:
    first, *lines = raw.split(b"\r\n")
    return b"\r\n".join([first, *(x for x in lines if x.partition(b":")[0].strip().lower() not in names)])


def _rewritten(request: InferenceRequest) -> InferenceRequest:
    """The request under the model name that the rewrite header asks for."""
    raw = request.headers
    model = raw.get(MODEL_REWRITE[0]) or raw.get(MODEL_REWRITE[1])
    if not model or not request.model or model == request.model:
        return request
    tree = msgspec.json.decode(request.body)
    tree["model"] = model
    return msgspec.structs.replace(request, model=model, body=msgspec.json.encode(tree))


def server_tls(cert: str, key: str) -> ssl.SSLContext:
    """TLS for the data port, from PEM files."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(cert, key)
    except (OSError, ssl.SSLError) as exc:
        raise SettingsError(f"server.tls_cert, server.tls_key: cannot be used: {exc}") from exc
    context.set_alpn_protocols(["http/1.1"])
    return context
