"""The fast lane: decisions over plain HTTP, as Envoy's ext_authz filter asks for them.

Each request comes whole (head, then body); the answer is a head alone: 200 with the endpoint, or what the
client is to be told. Responses pass by, so ends are known from Envoy's access log. A third of the cost of the
same decision over ext_proc; what this filter cannot do is in docs/howto/envoy.md.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from pathlib import Path

from pointsman import api
from pointsman.config import Server
from pointsman.errors import PointsmanError, SettingsError
from pointsman.extproc.access_log import AccessLogIntake
from pointsman.extproc.completions import Completions
from pointsman.extproc.destinations import Destinations
from pointsman.extproc.envoy_config import DECIDE
from pointsman.extproc.grpc import GrpcServer
from pointsman.extproc.refusals import DROP_REASONS
from pointsman.extproc.xds import EndpointLists
from pointsman.proxy.core import Core
from pointsman.proxy.head import RequestHead
from pointsman.proxy.server import ClientConnection
from pointsman.router import Flight
from pointsman.types import Ending, InferenceRequest, Outcome

log = logging.getLogger(__name__)

SWEEP_S = 0.25
DRAIN_S = 2.0
REFUSED_STATUS = 429
"""For what would be 5xx: Envoy takes a 5xx for a fault of ours and drops the body."""


class FastLane:
    """Answers Envoy's questions on a unix socket (``core.Front``, ``server.Host``); its lists and its log
    come on another.
    """

    def __init__(self, core: Core, requests: Path, control: Path) -> None:
        self._core = core
        self._requests = requests
        self._control = control
        self.clock = core.clock
        self.settings: Server = core.settings.server
        self.draining = False
        self.clients: set[ClientConnection] = set()
        self._destinations = Destinations(core.pool)
        self.completions = Completions(
            core.router, self._destinations, core.clock, core.settings.upstream.first_byte_timeout_s
        )
        self._lists = EndpointLists(core.pool, self._destinations)
        self._log = AccessLogIntake(self.completions.completed)
        self._grpc = GrpcServer({**self._lists.services, **self._log.services})
        self._server: asyncio.Server | None = None

    # -- life

    async def start(self) -> int:
        await self._destinations.resolve()
        self._lists.renew()
        await self._grpc.start(path=str(self._control), setting="envoy")
        self._requests.unlink(missing_ok=True)
        try:
            self._server = await asyncio.get_running_loop().create_unix_server(
                lambda: ClientConnection(self), str(self._requests), backlog=4096
            )
        except OSError as exc:
            raise SettingsError(f"envoy: {self._requests} cannot be opened: {exc.strerror}") from exc
        return 0

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._lists.run())
            tasks.create_task(self._destinations.run())
            tasks.create_task(self._sweep())

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self.completions.sweep()

    async def drain(self) -> None:
        self.draining = True
        if self._server:
            self._server.close()
        self._lists.drain()
        self._log.drain()
        await self._grpc.drain(DRAIN_S)

    def settle(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        if self._server:
            self._server.close()
        for client in list(self.clients):
            client.abort()
        self._grpc.close()
        self.completions.close()

    # -- requests

    def begin(self, client: ClientConnection, head: RequestHead, body: bytes) -> None:
        """Answer at once, or when the prompt's token ids are known."""
        if not head.path.startswith(DECIDE):
            client.write(HEALTHY if head.path == "/healthz" and not self.draining else UNHEALTHY)
            client.exchange_done()
            return
        client.waiting = True
        at_s, path = self.clock(), head.path.removeprefix(DECIDE)
        request_id = head.headers.get("x-request-id", "")
        told = partial(self._decided, client, path, request_id, at_s)
        try:
            request = self._core.router.format_of(path).parse(request_id, path, head.headers, body)
            self._core.opening.open(request, told)
        except PointsmanError as error:
            told(error)
        except Exception:  # a plugin's bug must not cost the others their answer
            log.exception("request for %s could not be decided", path)
            self._write(client, FAULT)

    def refuse(self, client: ClientConnection, head: RequestHead | None, error: PointsmanError) -> None:
        """Bytes that are no request; Envoy sends none."""
        client.respond_error(error, head, "")
        client.exchange_done()

    def _decided(
        self,
        client: ClientConnection,
        path: str,
        request_id: str,
        at_s: float,
        found: Flight | PointsmanError,
    ) -> None:
        if isinstance(found, PointsmanError):
            self._write(client, self._refusal(path, request_id, found, self.clock() - at_s))
            return
        name = self.completions.name()
        self.completions.add(name, found, at_s)
        told = "".join(f"\r\n{name}: {value}" for name, value in found.decision.request_headers)
        self._write(
            client,
            b"%b%b\r\nx-pointsman-flight: %b%b\r\n\r\n"
            % (CHOSEN, self._where(found), name.encode(), told.encode("latin-1")),
        )

    def _write(self, client: ClientConnection, answer: bytes) -> None:
        client.waiting = False
        if not client.gone:
            client.write(answer)
            client.exchange_done()

    def _where(self, flight: Flight) -> bytes:
        """The endpoint, then those to try after it."""
        decision = flight.decision
        found = map(self._destinations.of, [e.name for e in (decision.chosen, *decision.fallbacks)])
        return ",".join(filter(None, found)).encode()

    def _refusal(self, path: str, request_id: str, error: PointsmanError, duration_s: float) -> bytes:
        outcome = Outcome(
            ending=Ending.REFUSED, status=error.status, tries=0, duration_s=duration_s, reason=error.reason
        )
        request = InferenceRequest(id=request_id, path=path, format="")
        self._core.router.observe(request, None, outcome)
        body = api.find(path).error_body(error)
        status = error.status if error.status < 500 else REFUSED_STATUS
        dropped = DROP_REASONS.get(error.reason)
        extra = b"x-llm-d-request-dropped-reason: %b\r\n" % dropped.encode() if dropped else b""
        if status == REFUSED_STATUS:
            extra += b"retry-after: 1\r\n"
        return b"HTTP/1.1 %d No\r\n%bcontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (
            status,
            extra,
            len(body),
            body,
        )


CHOSEN = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nx-gateway-destination-endpoint: "
HEALTHY = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"
UNHEALTHY = b"HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n"
FAULT = b"HTTP/1.1 500 No\r\ncontent-length: 0\r\n\r\n"
"""Envoy goes on without us, or not, as set."""
