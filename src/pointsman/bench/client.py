"""Sends calls to an OpenAI-compatible server and records what became of each."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from typing import Any, Literal
from urllib.parse import quote

import msgspec

from pointsman.bench.connection import Answer, Broken, Connections
from pointsman.bench.pace import Pace
from pointsman.bench.stream import Gaps, Reading
from pointsman.bench.workloads import Call
from pointsman.config import Url, split_url
from pointsman.errors import SettingsError
from pointsman.types import Usage

Api = Literal["completions", "chat"]
_PATHS: Mapping[Api, str] = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
ENDPOINT_HEADERS = (b"x-pointsman-endpoint", b"x-gateway-destination-endpoint-served")
"""Response headers in which a router may say who answered."""
_PROBE_TIMEOUT_S = 10.0


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """The server under test and how it is asked."""

    url: str
    model: str = ""
    """Empty: the first one of ``/v1/models``."""
    api: Api = "completions"
    api_key: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    ignore_eos: bool = True
    """Ask for exactly the output length: ``ignore_eos`` is an extension of vLLM and SGLang."""
    extra: Mapping[str, Any] = {}
    """Further fields of each request body."""
    timeout_s: float = 300.0
    """Engine seconds from sending to the last byte."""
    tls_verify: bool = True


class Record(msgspec.Struct, kw_only=True, gc=False):
    """One request from due to its end, in engine seconds. ``error`` is empty on success."""

    due_s: float
    sent_s: float
    end_s: float = 0.0
    first_s: float = 0.0
    """Arrival of the first token; 0.0 when none came."""
    last_s: float = 0.0
    events: int = 0
    """Token events that came."""
    status: int = 0
    error: str = ""
    detail: str = ""
    endpoint: str = ""
    usage: Usage = Usage()
    group: int = -1


class Client:
    """Sends calls; one connection for each request in flight. ``gaps`` gets all inter-token gaps."""

    def __init__(self, target: Target, pace: Pace) -> None:
        url = split_url(target.url, "URL")
        self._prefix = url.prefix.removesuffix("/v1")
        self._target = target
        self._pace = pace
        self._connections = Connections(url, _tls(url, target))
        self.gaps = Gaps()
        self.model = target.model
        fixed = {"Host": url.authority, "User-Agent": "pointsman-bench", "Accept": "*/*"}
        if target.api_key:
            fixed["Authorization"] = f"Bearer {target.api_key}"
        lines = [f"{name}: {value}" for name, value in (*fixed.items(), *target.headers)]
        if any(set(line) & {"\r", "\n"} or not line.isascii() for line in lines):
            raise SettingsError("--header: names and values are plain ASCII on one line")
        self._head = "\r\n".join(lines)

    async def find_model(self) -> str:
        """Check that the server answers, and which model to ask for; raises what the user is to do."""
        request = f"GET {quote(self._prefix)}/v1/models HTTP/1.1\r\n{self._head}\r\n\r\n".encode()
        pieces: list[bytes] = []
        try:
            async with asyncio.timeout(_PROBE_TIMEOUT_S):
                answer = await self._connections.exchange(request, pieces.append)
        except TimeoutError as exc:
            raise SettingsError(f"URL: {self._target.url}: no answer in {_PROBE_TIMEOUT_S:.0f} s") from exc
        except Broken as exc:
            raise SettingsError(f"URL: {self._target.url}: {exc}") from exc
        if self.model:
            return self.model
        try:
            self.model = _first_model(b"".join(pieces))
        except (LookupError, msgspec.DecodeError, UnicodeDecodeError, msgspec.ValidationError) as exc:
            raise SettingsError(f"--model: give one; /v1/models names none (status {answer.status})") from exc
        return self.model

    async def send(self, call: Call, due_s: float) -> Record:
        """Make the call now. Returns when it has ended, however; only cancelling raises."""
        record = Record(due_s=due_s, sent_s=self._pace.now(), group=call.group)
        reading = Reading(self.gaps)
        now = self._pace.now

        def on_body(data: bytes) -> None:
            reading.feed(data, now())

        try:
            async with asyncio.timeout(self._pace.wall_s(self._target.timeout_s)):
                answer = await self._connections.exchange(self._request(call), on_body)
        except TimeoutError:
            record.error, record.detail = "timeout", f"not complete after {self._target.timeout_s:g} s"
        except Broken as exc:
            record.error, record.detail = exc.kind, str(exc)
        else:
            self._judge(record, answer, reading)
        record.end_s = now()
        record.first_s, record.last_s, record.events = reading.first_s, reading.last_s, reading.events
        return record

    async def close(self) -> None:
        await self._connections.close()

    def _judge(self, record: Record, answer: Answer, reading: Reading) -> None:
        record.status = answer.status
        record.endpoint = next(
            (answer.headers[name].decode("latin-1") for name in ENDPOINT_HEADERS if name in answer.headers),
            "",
        )
        if answer.status != 200:
            record.error, record.detail = f"status {answer.status}", answer.body.decode(errors="replace")
            return
        record.usage, error = reading.finish()
        if error is not None:
            record.error, record.detail = "error in stream", error
        elif not reading.events:
            record.error, record.detail = "no tokens", "the answer was no stream of tokens"
        elif not reading.done:
            record.error, record.detail = "cut off", "the stream ended without [DONE]"

    def _request(self, call: Call) -> bytes:
        """Head and body."""
        body = msgspec.json.encode(self._fields(call))
        own = "".join([f"{name}: {value}\r\n" for name, value in call.headers])
        head = (
            f"POST {quote(self._prefix)}{_PATHS[self._target.api]} HTTP/1.1\r\n{self._head}\r\n{own}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    def _fields(self, call: Call) -> dict[str, Any]:
        chat = self._target.api == "chat"
        prompt = {"messages": [{"role": "user", "content": call.prompt}]} if chat else {"prompt": call.prompt}
        fields: dict[str, Any] = {"model": call.model or self.model, **prompt}
        fields |= {"max_tokens": call.output_tokens, "temperature": 0}
        fields |= {"stream": True, "stream_options": {"include_usage": True}}
        if call.cache_salt:
            fields["cache_salt"] = call.cache_salt
        if self._target.ignore_eos:
            fields["ignore_eos"] = True
        return fields | dict(self._target.extra)


def _tls(url: Url, target: Target) -> ssl.SSLContext | None:
    if not url.tls:
        return None
    context = ssl.create_default_context()
    if not target.tls_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: tuple[_Model, ...] = ()


def _first_model(body: bytes) -> str:
    return msgspec.json.decode(body, type=_Models).data[0].id
