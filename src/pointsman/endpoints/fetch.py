"""Asking an endpoint over one kept connection: metrics pages twenty times a second, the odd /v1/models, and
what a prompt's tokens are.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import cast

import httptools

from pointsman.config import Endpoint as EndpointSettings
from pointsman.config import Url
from pointsman.endpoints.target import Target, request_headers, ssl_context

Answer = Callable[[int, bytes], None]
"""Called with the HTTP status and the body; status 0 when there was no answer, then the body says why:
``b"connect"`` when nobody listens, ``b"timeout"``, ``b"broken"``."""


MAX_BODY_BYTES = 16 * 1024 * 1024
"""A metrics page of many LoRA adapters is a megabyte; more than this is not one."""


class Fetcher(asyncio.Protocol):
    """One GET at a time of one URL, or POSTs to its server. Reconnects when that has closed the connection in
    between.

    ``access`` (TLS, credentials) is the target's own unless given.
    """

    def __init__(
        self,
        target: Target,
        url: Url,
        path: str,
        timeout_s: float,
        on_answer: Answer,
        access: EndpointSettings | None = None,
    ) -> None:
        access = access or target.settings
        lines = {b"host": url.authority.encode(), b"accept": b"*/*", **request_headers(access)}
        head = b"".join(b"%s: %s\r\n" % pair for pair in lines.items())
        self._head = head
        self._get = self._request = b"GET " + path.encode() + b" HTTP/1.1\r\n" + head + b"\r\n"
        self._host = target.connect_host if url.host == target.url.host else url.host
        self._url = url
        self._ssl: ssl.SSLContext | None = ssl_context(access) if url.tls else None
        self._timeout_s = timeout_s
        self._on_answer = on_answer
        self._transport: asyncio.Transport | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._fresh = False
        self._parser: httptools.HttpResponseParser | None = None
        self._body: list[bytes] = []
        self._body_bytes = 0
        self.busy = False

    def get(self) -> None:
        """Start a GET; ``on_answer`` is called once. Must not be busy."""
        self._start(self._get)

    def post(self, path: str, body: bytes) -> None:
        """The same for a POST of JSON that may be sent twice: only asks, changes nothing."""
        length = b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
        self._start(b"".join((b"POST ", path.encode(), b" HTTP/1.1\r\n", self._head, length, body)))

    def _start(self, request: bytes) -> None:
        assert not self.busy
        self._request = request
        self.busy = True
        self._timer = asyncio.get_running_loop().call_later(self._timeout_s, self._end, 0, b"timeout")
        if self._transport is None:
            self._connect()
        else:
            self._send()

    def close(self) -> None:
        """Drop the connection; a GET under way is forgotten."""
        self.busy = False
        self._drop()

    def _drop(self) -> None:
        if self._timer:
            self._timer.cancel()
        if self._connecting:
            self._connecting.cancel()
            self._connecting = None
        transport, self._transport = self._transport, None
        if transport:
            transport.abort()

    def _connect(self) -> None:
        self._fresh = True
        self._connecting = asyncio.get_running_loop().create_task(self._open())

    async def _open(self) -> None:
        loop = asyncio.get_running_loop()
        name = self._url.host if self._ssl else None
        try:
            await loop.create_connection(
                lambda: self, self._host, self._url.port, ssl=self._ssl, server_hostname=name
            )
        except (OSError, UnicodeError) as exc:  # a host that is no name at all is a UnicodeError
            self._connecting = None
            refused = isinstance(exc, ConnectionRefusedError) or not isinstance(exc, ssl.SSLError)
            self._end(0, b"connect" if refused else b"broken")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast(asyncio.Transport, transport)  # uvloop's is one without saying so
        self._connecting = None
        if not self.busy:
            transport.abort()
            return
        self._transport = transport
        self._send()

    def _send(self) -> None:
        assert self._transport
        self._parser = httptools.HttpResponseParser(self)
        self._body = []
        self._body_bytes = 0
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if self._parser is None:
            self._drop()  # bytes nobody asked for
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._end(0, b"broken")
        if self._body_bytes > MAX_BODY_BYTES:
            self._end(0, b"broken")

    def on_body(self, data: bytes) -> None:
        self._body.append(data)
        self._body_bytes += len(data)

    def on_message_complete(self) -> None:
        parser = self._parser
        assert parser
        if parser.get_status_code() >= 200:
            self._end(parser.get_status_code(), b"".join(self._body), keep=parser.should_keep_alive())

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if not self.busy:
            return
        if not self._fresh and not self._body:
            self._connect()  # the server closed the idle connection while we were sending
        else:
            self._end(0, b"broken")

    def _end(self, status: int, body: bytes, keep: bool = False) -> None:
        self.busy = self._fresh = False
        self._parser = None
        self._body_bytes = 0
        if self._timer:
            self._timer.cancel()
        if not keep:
            self._drop()
        self._on_answer(status, body)


async def fetch(
    target: Target, url: Url, path: str, timeout_s: float, access: EndpointSettings | None = None
) -> tuple[int, bytes]:
    """One GET of ``path`` at ``url``, on a connection of its own. Status and body as for ``Answer``."""
    done: asyncio.Future[tuple[int, bytes]] = asyncio.get_running_loop().create_future()

    def answer(status: int, body: bytes) -> None:
        if not done.done():
            done.set_result((status, body))

    fetcher = Fetcher(target, url, path, timeout_s, answer, access)
    fetcher.get()
    try:
        return await done
    finally:
        fetcher.close()
