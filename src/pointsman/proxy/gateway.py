"""The data port: complete requests from clients become exchanges, or an answer of our own."""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from collections.abc import Awaitable, Callable
from functools import partial

import msgspec

from pointsman.errors import BadRequest, ModelNotFound, PathNotFound, PointsmanError, SettingsError
from pointsman.proxy.exchange import Exchange
from pointsman.proxy.head import MODEL_REWRITE, RequestHead
from pointsman.proxy.paths import PathPolicy
from pointsman.proxy.plane import Plane
from pointsman.proxy.server import ClientConnection, listen
from pointsman.router import Flight
from pointsman.types import Ending, InferenceRequest, Outcome

log = logging.getLogger(__name__)

SWEEP_S = 0.25


class Gateway:
    """Answers requests on the data port (``server.Host``)."""

    def __init__(self, plane: Plane, refresh_models: Callable[[], Awaitable[None]]) -> None:
        self.plane = plane
        self.settings = plane.settings.server
        self.clock = plane.clock
        self.draining = False
        self.clients: set[ClientConnection] = set()
        self._refresh_models = refresh_models
        self._looking: set[asyncio.Task[None]] = set()
        self._paths = PathPolicy(self.settings.allow_paths)
        self._id_prefix = os.urandom(8).hex()
        self._id = 0
        self._arrived: list[tuple[ClientConnection, RequestHead, bytes]] = []
        self._batch = False
        self._decided: list[Exchange] = []
        self._server: asyncio.Server | None = None

    # -- life

    async def start(self) -> int:
        """Listen; returns the port."""
        settings = self.settings
        tls = server_tls(settings.tls_cert, settings.tls_key) if settings.tls_cert else None
        self._server = await listen(
            self, settings.host, settings.port, "server.port", tls, reuse_port=settings.workers > 0
        )
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def run(self) -> None:
        """Watch the deadlines, until cancelled."""
        while True:
            await asyncio.sleep(SWEEP_S)
            now = self.clock()
            for client in list(self.clients):
                client.check(now)
            self.plane.sweep(SWEEP_S)

    async def drain(self) -> None:
        """Take no new connections and let running requests end for ``drain_s``."""
        self.draining = True
        if self._server:
            self._server.close()
        for client in list(self.clients):
            client.drain()
        deadline = self.clock() + self.settings.drain_s
        while self._unfinished() and self.clock() < deadline:  # noqa: ASYNC110 - bounded by drain_s
            await asyncio.sleep(0.02)
        if left := self._unfinished():
            log.warning("stopping with %d requests unfinished", left)

    def settle(self) -> None:
        """Tell the router of everything that is over, now."""
        self.plane.settle()

    def close(self) -> None:
        """Cut whatever is left."""
        if self._server:
            self._server.close()
        for task in self._looking:
            task.cancel()
        for client in list(self.clients):
            client.abort()
        self.plane.close()

    def _unfinished(self) -> int:
        return sum(client.busy for client in self.clients)

    # -- requests

    def _new_id(self) -> str:
        self._id += 1
        return f"{self._id_prefix}{self._id:08x}"

    def begin(self, client: ClientConnection, head: RequestHead, body: bytes) -> None:
        """A complete request has arrived.

        What arrives in one turn of the event loop is decided together and then sent together: under load the
        same code runs over a batch in half the time it takes between system calls.
        """
        client.waiting = True
        self._arrived.append((client, head, body))
        if len(self._arrived) == 1:
            asyncio.get_running_loop().call_soon(self.answer_arrived)

    def answer_arrived(self) -> None:
        """Decide and send everything that has arrived."""
        arrived, self._arrived = self._arrived, []
        self._batch = True
        for client, head, body in arrived:
            try:
                self._decide(client, head, body)
            except Exception:  # a plugin's bug must not cost the others their answer
                log.exception("request for %s could not be decided", head.path)
                client.waiting = False
                self._refuse(
                    client, head, self._new_id(), PointsmanError("Internal error; see the log."), 0.0
                )
        self._batch = False
        self._send_decided()

    def _decide(self, client: ClientConnection, head: RequestHead, body: bytes) -> None:
        client.waiting = False
        if client.gone:
            return
        at_s = self.clock()
        request_id = head.request_id or self._new_id()
        router = self.plane.router
        try:
            fmt = head.format
            if fmt is None:
                if head.method == b"GET" and self._answer_here(client, head, request_id):
                    return
                if not self._paths.passes(head.path):
                    raise PathNotFound(f"The path {head.path} is not served here.")
                fmt = head.format = router.format_of(head.path)
            request = fmt.parse(request_id, head.path, head.headers, body)
            if head.rewrites:
                request = rewritten(request)
        except PointsmanError as error:
            self._refuse(client, head, request_id, error, self.clock() - at_s)
            return
        client.waiting = True
        self.plane.opening.open(request, partial(self._decided_on, client, head, request, at_s))

    def _decided_on(
        self,
        client: ClientConnection,
        head: RequestHead,
        request: InferenceRequest,
        at_s: float,
        found: Flight | PointsmanError,
    ) -> None:
        """The request has been decided on: now, or after its token ids were looked for."""
        if isinstance(found, ModelNotFound):
            self._look_again(client, head, request, at_s)
        else:
            self._answer(client, head, request, at_s, found)

    def _answer(
        self,
        client: ClientConnection,
        head: RequestHead,
        request: InferenceRequest,
        at_s: float,
        found: Flight | PointsmanError,
    ) -> None:
        client.waiting = False
        if isinstance(found, PointsmanError):
            if client.gone:
                self.plane.router.observe(request, None, self._left(at_s))
            else:
                self._refuse(client, head, request.id, found, self.clock() - at_s)
        elif client.gone:
            self.plane.router.close(found, self._left(at_s))
        else:
            exchange = client.exchange = Exchange(self.plane, client, head, found, at_s)
            self._decided.append(exchange)
            if not self._batch and len(self._decided) == 1:
                asyncio.get_running_loop().call_soon(self._send_decided)

    def _send_decided(self) -> None:
        """Send everything that has been decided on."""
        decided, self._decided = self._decided, []
        for exchange in decided:
            exchange.send()

    def _left(self, at_s: float) -> Outcome:
        """The client left before its request was sent anywhere."""
        return Outcome(
            ending=Ending.CANCELLED,
            status=0,
            tries=0,
            duration_s=self.clock() - at_s,
            reason="client_left",
        )

    def _look_again(
        self, client: ClientConnection, head: RequestHead, request: InferenceRequest, at_s: float
    ) -> None:
        """The model may have been loaded a moment ago: ask the endpoints before saying no."""
        client.waiting = True
        task = asyncio.get_running_loop().create_task(self._look(client, head, request, at_s))
        self._looking.add(task)
        task.add_done_callback(self._looking.discard)

    async def _look(
        self, client: ClientConnection, head: RequestHead, request: InferenceRequest, at_s: float
    ) -> None:
        await self._refresh_models()
        if client.gone:
            client.waiting = False
            self.plane.router.observe(request, None, self._left(at_s))
        else:
            self.plane.opening.open(request, partial(self._answer, client, head, request, at_s))

    def refuse(self, client: ClientConnection, head: RequestHead | None, error: PointsmanError) -> None:
        """Answer bytes that did not become a request."""
        request_id = head.request_id if head else ""
        self._refuse(client, head, request_id or self._new_id(), error, 0.0)

    def _refuse(
        self,
        client: ClientConnection,
        head: RequestHead | None,
        request_id: str,
        error: PointsmanError,
        duration_s: float,
    ) -> None:
        request = InferenceRequest(id=request_id, path=head.path if head else "", format="")
        outcome = Outcome(
            ending=Ending.REFUSED, status=error.status, tries=0, duration_s=duration_s, reason=error.reason
        )
        self.plane.router.observe(request, None, outcome)
        client.respond_error(error, head, request_id)
        client.exchange_done()

    # -- what we answer ourselves

    def _answer_here(self, client: ClientConnection, head: RequestHead, request_id: str) -> bool:
        status, path = 200, head.path
        if path in ("/health", "/ping"):
            status = 200 if self.plane.pool.ready and not self.draining else 503
            body = b"{}"
        elif path == "/v1/models":
            body = msgspec.json.encode({"object": "list", "data": self._models()})
        elif path.startswith("/v1/models/"):
            name = path.removeprefix("/v1/models/")
            found = next((m for m in self._models() if m.get("id") == name), None)
            if found is None:
                self._refuse(client, head, request_id, ModelNotFound(name, self.plane.pool.models()), 0.0)
                return True
            body = msgspec.json.encode(found)
        else:
            return False
        client.respond(status, body, request_id)
        client.exchange_done()
        return True

    def _models(self) -> list[dict[str, object]]:
        """The union of what the endpoints serve, each model as the first endpoint describes it."""
        union: dict[object, dict[str, object]] = {}
        for member in self.plane.pool.members.values():
            for entry in member.models_detail:
                union.setdefault(entry.get("id"), entry)
        return list(union.values())


def rewritten(request: InferenceRequest) -> InferenceRequest:
    """The request under the model name that a rewrite header asks for."""
    model = next(filter(None, map(request.headers.get, MODEL_REWRITE)), "")
    if not request.model or model == request.model:
        return request
    try:
        tree = msgspec.json.decode(request.body)
    except msgspec.DecodeError as exc:
        raise BadRequest(f"{MODEL_REWRITE[0]} needs a JSON body: {exc}.") from exc
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
