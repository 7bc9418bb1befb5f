"""A picker on grpc.aio that knows the protocol, as plainly as it can be written: the suite's own yardstick.

Each behaviour is a small method or an attribute, so that ``broken_pickers`` can break it alone.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import yaml
from envoy.config.core.v3.base_pb2 import HeaderValueOption
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import DecodeError

from pointsman.conformance.groups import ENDPOINTS_FILE, Group
from pointsman.conformance.start import Launch
from pointsman.conformance.subject import Place

DESTINATION = "x-gateway-destination-endpoint"
STRIPPED = (
    *("x-llm-d-inference-fairness-id", "x-llm-d-inference-objective", "x-llm-d-model-name-rewrite"),
    *("x-llm-d-slo-ttft-ms", "x-llm-d-slo-tpot-ms"),
    *("x-llm-d-video-fps", "x-llm-d-video-duration-seconds", "x-llm-d-video-resolution"),
    *(f"{DESTINATION}-subset", f"{DESTINATION}-served", "x-llm-d-request-dropped-reason"),
)
STRIPPED_OLD = (
    *("x-gateway-inference-fairness-id", "x-gateway-inference-objective", "x-gateway-model-name-rewrite"),
    *("x-slo-ttft-ms", "x-slo-tpot-ms"),
)
CODES = {
    400: "BadRequest",
    412: "PreconditionFailed",
    429: "ResourceExhausted",
    500: "Internal",
    503: "ServiceUnavailable",
}
BLOCK_BYTES = 256
READ_EVERY_S = 0.005
SERVICES = ("", "liveness", "readiness", "envoy.service.ext_proc.v3.ExternalProcessor")
Message = ext_proc.ProcessingRequest
Response = ext_proc.ProcessingResponse


class Refused(Exception):
    def __init__(self, status: int, text: str, reason: str = "") -> None:
        super().__init__(text)
        self.status, self.text, self.reason = status, text, reason


class OutOfPlace(Exception):
    """A message that does not belong there."""


@dataclass
class Endpoint:
    name: str
    address: str
    waiting: float = 0.0
    kv: float = 0.0
    loras: tuple[str, ...] = ()
    told: bool = True
    under_way: int = 0
    prefixes: set[object] = field(default_factory=set)

    @property
    def host(self) -> str:
        return self.address.rpartition(":")[0]


@dataclass
class Flow:
    """One stream."""

    headers: dict[str, bytes] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    buffered: bool = False
    """Request body mode BUFFERED."""
    bodyless: bool = False
    """Response body mode NONE."""
    body: bytes = b""
    sent_length: int = 0
    model: str = ""
    client_model: str = ""
    stream: bool = False
    prompt: str = ""
    salt: str = ""
    chosen: Endpoint | None = None
    counted: Endpoint | None = None
    answered: bool = False
    """The response has begun."""
    sse: bool = False
    response: bytes = b""

    def header(self, *names: str) -> str:
        assert self.headers is not None
        return next((self.headers[n].decode("latin-1") for n in names if n in self.headers), "")


class Picker:
    chunk_bytes = 62_000
    response_chunk_bytes = 62_000
    clear_route_cache = True
    max_body_bytes = 1 << 30
    alpn = True

    def __init__(self, folder: Path, flags: Sequence[str]) -> None:
        config = yaml.safe_load((folder / "epp.yaml").read_text())
        self.file = folder / ENDPOINTS_FILE
        self.file_version = (0, 0)
        self.flags = flags
        self.parameters = {p["type"]: p.get("parameters", {}) for p in config["plugins"]}
        uses = config["schedulingProfiles"][0]["plugins"]
        self.weights = {use["pluginRef"]: use["weight"] for use in uses if "weight" in use}
        self.parsers = [p["pluginRef"] for p in config.get("requestHandler", {}).get("parsers", [])]
        self.endpoints: list[Endpoint] = []
        self.tokens: Counter[str] = Counter()
        self.requests: Counter[tuple[str, str]] = Counter()
        self.read_endpoints()

    # -- the pool

    def read_endpoints(self) -> None:
        stat = self.file.stat()
        if self.file_version != (stat.st_mtime_ns, stat.st_ino):
            self.file_version = (stat.st_mtime_ns, stat.st_ino)
            known = {e.address: e for e in self.endpoints}
            entries = yaml.safe_load(self.file.read_text())["endpoints"]
            found = [Endpoint(e["name"], f"{e['address']}:{e['port']}") for e in entries]
            self.endpoints = [known.get(e.address, e) for e in found]

    async def watch(self) -> None:
        while True:
            self.read_endpoints()
            for endpoint in self.endpoints:
                await self.read_page(endpoint)
            await asyncio.sleep(READ_EVERY_S)

    async def read_page(self, endpoint: Endpoint) -> None:
        host, _, port = endpoint.address.rpartition(":")
        with suppress(OSError):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"content-length: (\d+)", head)
                assert length is not None
                page = (await reader.readexactly(int(length[1]))).decode()
            finally:
                writer.close()
            self.learn(endpoint, head.split(b" ", 2)[1] == b"200", page)

    def learn(self, endpoint: Endpoint, told: bool, page: str) -> None:
        endpoint.told = told
        if told:
            endpoint.waiting = float(_value(r"vllm:num_requests_waiting{.*} (\S+)", page))
            endpoint.kv = float(_value(r"vllm:kv_cache_usage_perc{.*} (\S+)", page))
            endpoint.loras = tuple(_value(r'running_lora_adapters="([^"]*)"', page).split(","))

    def usable(self) -> list[Endpoint]:
        return self.endpoints

    def candidates(self, flow: Flow) -> list[Endpoint]:
        hint = flow.metadata.get("envoy.lb.subset_hint", {}).get(f"{DESTINATION}-subset")
        if not self.is_hint(hint):
            return self.usable()
        return self.matching([each for each in hint if isinstance(each, str)])

    def is_hint(self, hint: object) -> bool:
        return isinstance(hint, list) and "--disable-endpoint-subset-filter" not in self.flags

    def matching(self, members: Sequence[str]) -> list[Endpoint]:
        hosts = {member.rpartition(":")[0] for member in members}
        return [e for e in self.usable() if e.host in hosts]

    # -- scheduling

    def schedule(self, flow: Flow) -> list[Endpoint]:
        candidates = self.candidates(flow)
        if not candidates:
            raise Refused(503, "no endpoint", "rejected-no-endpoints")
        candidates = self.filtered(candidates)
        if not candidates:
            raise Refused(429, "all endpoints are full", "rejected-saturated")
        pinned = self.pinned(flow, candidates)
        ordered = self.ordered(flow, pinned or candidates)
        if "if-available" in flow.header("prefer") and not self.holds(flow, ordered[0]):
            raise Refused(412, "no cached prefix")
        count = self.parameters["max-score-picker"].get("maxNumOfEndpoints", 1)
        ordered[0].prefixes.update(self.blocks(flow))
        return ordered[:count]

    def filtered(self, endpoints: list[Endpoint]) -> list[Endpoint]:
        for condition in self.parameters.get("utilization-filter", {}).get("conditions", ()):
            endpoints = [e for e in endpoints if e.waiting <= condition["maxValue"]]
        return endpoints

    def ordered(self, flow: Flow, endpoints: list[Endpoint]) -> list[Endpoint]:
        scores = self.scores(flow, endpoints)
        return sorted(endpoints, key=lambda e: (-scores[e.address], uuid.uuid4().int))

    def scores(self, flow: Flow, endpoints: Sequence[Endpoint]) -> dict[str, float]:
        return {e.address: sum(self.terms(flow, e, endpoints).values()) for e in endpoints}

    def terms(self, flow: Flow, endpoint: Endpoint, endpoints: Sequence[Endpoint]) -> dict[str, float]:
        weighted = self.weights
        waiting = [e.waiting for e in endpoints]
        span = max(waiting) - min(waiting)
        blocks = self.blocks(flow)
        shared = sum(block in endpoint.prefixes for block in blocks) / len(blocks) if blocks else 0.0
        found = {
            "queue-scorer": (max(waiting) - endpoint.waiting) / span if span else 1.0,
            "kv-cache-utilization-scorer": 1 - endpoint.kv,
            "lora-affinity-scorer": self.lora(flow, endpoint),
            "prefix-cache-scorer": shared,
            "active-request-scorer": -float(endpoint.under_way),
        }
        return {name: found[name] * weight for name, weight in weighted.items()}

    def lora(self, flow: Flow, endpoint: Endpoint) -> float:
        if flow.model in endpoint.loras:
            return 1.0
        return 0.8 if len([lora for lora in endpoint.loras if lora]) < 2 else 0.0

    def blocks(self, flow: Flow) -> list[object]:
        chain: list[object] = [self.root(flow)]
        for end in range(BLOCK_BYTES, len(flow.prompt) + 1, BLOCK_BYTES):
            chain.append(hash((chain[-1], flow.prompt[end - BLOCK_BYTES : end])))
        return chain[1:]

    def root(self, flow: Flow) -> tuple[str, ...]:
        return (flow.model, flow.salt)

    def holds(self, flow: Flow, endpoint: Endpoint) -> bool:
        return any(block in endpoint.prefixes for block in self.blocks(flow))

    def pinned(self, flow: Flow, endpoints: Sequence[Endpoint]) -> list[Endpoint]:
        token = flow.header("x-session-token")
        return [e for e in endpoints if token and self.token(e) == token]

    def token(self, endpoint: Endpoint) -> str:
        return base64.b64encode(f"default/{endpoint.name}".encode()).decode()

    # -- the request

    def first(self, flow: Flow, message: Message) -> None:
        flow.buffered = message.protocol_config.request_body_mode == 2
        has_modes = message.HasField("protocol_config")
        flow.bodyless = has_modes and message.protocol_config.response_body_mode == 0
        flow.metadata = MessageToDict(message.metadata_context).get("filterMetadata", {})
        headers = message.request_headers.headers.headers
        flow.headers = {h.key: self.value(h.raw_value or h.value.encode()) for h in headers}

    def value(self, value: bytes) -> bytes:
        return value

    def path(self, flow: Flow) -> str:
        found = flow.header(":path", "x-original-path", "x-forwarded-path") or "/v1/completions"
        return found.partition("?")[0]

    def parse(self, flow: Flow) -> None:
        if len(flow.body) > self.max_body_bytes:
            raise Refused(413, "too large")
        if not self.reads(self.path(flow)):
            return
        try:
            fields = self.loads(flow.body)
        except (ValueError, RecursionError) as exc:
            raise Refused(400, f"invalid JSON: {exc}") from exc
        if not isinstance(fields, dict) or not isinstance(fields.get("model"), str):
            raise Refused(400, self.no_model)
        flow.client_model = flow.model = fields["model"]
        flow.stream = fields.get("stream") is True
        flow.prompt = str(fields.get("prompt", ""))
        flow.salt = str(fields.get("cache_salt", ""))
        target = self.target(flow)
        if target:
            self.rewrite(flow, target)

    no_model = "model not found in request body"

    def loads(self, body: bytes) -> object:
        return json.loads(body)

    def reads(self, path: str) -> bool:
        """Whether the body is read at all."""
        if self.parsers == ["passthrough-parser"]:
            return False
        if path not in ("/v1/completions", "/v1/chat/completions"):
            if self.parsers:
                raise Refused(400, "no parser for this path")
            return False
        return True

    def target(self, flow: Flow) -> str:
        return flow.header("x-llm-d-model-name-rewrite", "x-gateway-model-name-rewrite")

    def rewrite(self, flow: Flow, target: str) -> None:
        flow.model = target
        pattern = rb'("model"\s*:\s*)' + re.escape(json.dumps(flow.client_model).encode())
        flow.body = re.sub(pattern, lambda m: m[1] + json.dumps(target).encode(), flow.body, count=1)

    def removed(self) -> Sequence[str]:
        return (*STRIPPED, *STRIPPED_OLD)

    def set_headers(self, flow: Flow, destination: str, length: int | None) -> dict[str, bytes]:
        found = {DESTINATION: destination.encode()}
        if length is not None:
            found["content-length"] = str(length).encode()
        if not flow.header("x-request-id"):
            found["x-request-id"] = self.new_id().encode()
        return found

    def new_id(self) -> str:
        return str(uuid.uuid4())

    def append_action(self, flow: Flow, name: str) -> str:
        return "OVERWRITE_IF_EXISTS_OR_ADD"

    def metadata(self, flow: Flow, destination: str, endpoints: Sequence[Endpoint]) -> dict[str, Any]:
        fields: dict[str, Any] = {DESTINATION: destination}
        if endpoints and self.tells_scores():
            fields[f"{DESTINATION}-scores"] = self.scores(flow, self.endpoints)
        return fields

    def tells_scores(self) -> bool:
        return "--emit-endpoint-scores" in self.flags

    def mutate(self, flow: Flow, common: Any, destination: str, length: int | None) -> None:
        common.clear_route_cache = self.clear_route_cache
        common.header_mutation.remove_headers.extend(self.removed())
        for name, value in self.set_headers(flow, destination, length).items():
            option = common.header_mutation.set_headers.add()
            option.header.key, option.header.raw_value = name, value
            action = self.append_action(flow, name)
            option.append_action = HeaderValueOption.HeaderAppendAction.Value(action)

    def headers_only(self, flow: Flow) -> Iterator[Response]:
        if not self.usable():
            raise self.nothing_there()
        destination = sorted(self.usable(), key=lambda _: uuid.uuid4().int)[0].address
        response = Response()
        self.mutate(flow, response.request_headers.response, destination, None)
        response.dynamic_metadata["envoy.lb"] = self.metadata(flow, destination, ())
        yield response

    def nothing_there(self) -> Refused:
        return Refused(500, "no pods available in datastore")

    def decide(self, flow: Flow) -> str:
        self.parse(flow)
        endpoints = self.schedule(flow)
        flow.chosen = endpoints[0]
        self.count(flow)
        self.requests[flow.client_model, flow.model] += 1
        return ",".join(e.address for e in endpoints)

    def count(self, flow: Flow) -> None:
        flow.counted = flow.chosen
        assert flow.counted is not None
        flow.counted.under_way += 1

    def release(self, flow: Flow) -> None:
        if flow.counted is not None:
            flow.counted.under_way -= 1
            flow.counted = None

    def cut(self, flow: Flow) -> None:
        """The stream is over, whatever was under way."""
        self.release(flow)

    def whole(self, flow: Flow, trailers: bool) -> Iterator[Response]:
        destination = self.decide(flow)
        response = Response()
        if flow.buffered:
            common = response.request_body.response
            self.mutate(flow, common, destination, len(flow.body))
            common.body_mutation.body = flow.body
        else:
            self.mutate(flow, response.request_headers.response, destination, len(flow.body))
        response.dynamic_metadata["envoy.lb"] = self.metadata(flow, destination, self.endpoints)
        yield response
        if not flow.buffered:
            yield from self.body_answers("request_body", flow.body, self.chunk_bytes, end=not trailers)
        if trailers:
            yield Response(request_trailers=ext_proc.TrailersResponse())

    def body_answers(self, kind: str, body: bytes, size: int, end: bool) -> Iterator[Response]:
        starts = range(0, max(len(body), 1), size)
        for start in starts:
            yield body_answer(kind, body[start : start + size], end and start == starts[-1])

    def request_body(self, flow: Flow, data: bytes, end: bool) -> Iterator[Response]:
        if flow.headers is None:
            raise OutOfPlace("a body before the headers")
        flow.body += data
        if end:
            yield from self.whole(flow, trailers=False)

    # -- the response

    def response_headers(self, flow: Flow, headers: dict[str, bytes], end: bool) -> Iterator[Response]:
        if flow.headers is None or flow.chosen is None:
            raise OutOfPlace("a response before its request")
        flow.answered = True
        flow.sse = self.streams(flow, headers.get("content-type", b""))
        response = Response()
        for name, value in self.response_set(flow).items():
            option = response.response_headers.response.header_mutation.set_headers.add()
            option.header.key, option.header.raw_value = name, value
        yield response
        if end or flow.bodyless:
            self.release(flow)

    def streams(self, flow: Flow, content_type: bytes) -> bool:
        return b"text/event-stream" in content_type or flow.stream

    def response_set(self, flow: Flow) -> dict[str, bytes]:
        assert flow.chosen is not None
        found = {"x-went-into-resp-headers": b"true"}
        if "session-affinity-filter" in self.parameters:
            found["x-session-token"] = self.token(flow.chosen).encode()
        return found

    def response_body(self, flow: Flow, data: bytes, end: bool) -> Iterator[Response]:
        if not flow.answered:
            raise OutOfPlace("a response body before its headers")
        if flow.sse:
            self.use_events(data)
            yield from self.event(flow, data, end)
        else:
            flow.response += data
            if end:
                yield from self.response_whole(flow, end=True)
        if end:
            self.ended(flow)

    def event(self, flow: Flow, data: bytes, end: bool) -> Iterator[Response]:
        yield body_answer("response_body", self.renamed_event(flow, data), end)

    def renamed_event(self, flow: Flow, data: bytes) -> bytes:
        return self.renamed(flow, data)

    def renamed(self, flow: Flow, data: bytes) -> bytes:
        if flow.model == flow.client_model:
            return data
        for form in ('"model":"{}"', '"model": "{}"'):
            old, new = form.format(flow.model).encode(), form.format(flow.client_model).encode()
            data = data.replace(old, new)
        return data

    def ended(self, flow: Flow) -> None:
        self.release(flow)

    def response_whole(self, flow: Flow, end: bool) -> Iterator[Response]:
        self.use_json(flow.response)
        body = self.renamed(flow, flow.response)
        yield from self.body_answers("response_body", body, self.response_chunk_bytes, end)

    def response_trailers(self, flow: Flow) -> Iterator[Response]:
        if not flow.sse:
            yield from self.response_whole(flow, end=False)
        self.ended(flow)
        yield Response(response_trailers=ext_proc.TrailersResponse())

    def use_json(self, body: bytes) -> None:
        with suppress(ValueError):
            self.use(json.loads(body))

    def use_events(self, data: bytes) -> None:
        for event in data.split(b"\n\n"):
            with suppress(ValueError):
                self.use(json.loads(event.removeprefix(b"data: ")))

    def use(self, answer: object) -> None:
        usage = answer.get("usage") if isinstance(answer, dict) else None
        for key in ("prompt_tokens", "completion_tokens"):
            if isinstance(usage, dict) and isinstance(usage.get(key), int):
                self.tokens[key] += usage[key]

    # -- the stream

    def answers(self, flow: Flow, message: Message) -> Iterator[Response]:
        kind = message.WhichOneof("request")
        if kind == "request_headers":
            self.first(flow, message)
            if message.request_headers.end_of_stream:
                yield from self.headers_only(flow)
            elif flow.buffered:
                yield Response(request_headers=ext_proc.HeadersResponse())
        elif kind == "request_body":
            yield from self.request_body(flow, message.request_body.body, message.request_body.end_of_stream)
        elif kind == "request_trailers":
            yield from self.whole(flow, trailers=True)
        elif kind == "response_headers":
            headers = {h.key: h.raw_value for h in message.response_headers.headers.headers}
            self.served(flow, MessageToDict(message.metadata_context).get("filterMetadata", {}))
            yield from self.response_headers(flow, headers, message.response_headers.end_of_stream)
        elif kind == "response_body":
            yield from self.response_body(
                flow, message.response_body.body, message.response_body.end_of_stream
            )
        elif kind == "response_trailers":
            yield from self.response_trailers(flow)

    def served(self, flow: Flow, metadata: dict[str, Any]) -> None:
        """Told which endpoint it was."""

    def refusal(self, refused: Refused) -> Response:
        response = Response()
        answer = response.immediate_response
        answer.status.code = refused.status
        answer.body = self.refusal_text(refused).encode()
        if refused.reason:
            option = answer.headers.set_headers.add()
            option.header.key, option.header.raw_value = (
                "x-llm-d-request-dropped-reason",
                refused.reason.encode(),
            )
        return response

    def refusal_text(self, refused: Refused) -> str:
        return f"inference error: {CODES.get(refused.status, 'Unknown')} - {refused.text}"

    async def process(self, messages: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        flow = Flow()
        try:
            async for data in messages:
                try:
                    for response in self.answers(flow, Message.FromString(data)):
                        yield response.SerializeToString()
                except Refused as refused:
                    yield self.refusal(refused).SerializeToString()
                    self.refused()
                    return
                except DecodeError as exc:
                    await self.wrong(context, exc)
                except OutOfPlace as exc:
                    await self.wrong(context, exc)
            await self.half_closed(context)
        finally:
            self.cut(flow)

    def refused(self) -> None:
        """A request has been refused."""

    async def wrong(self, context: Any, error: Exception) -> None:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))

    async def half_closed(self, context: Any) -> None:
        """The proxy sends no more."""

    # -- its other ports

    async def check(self, request: bytes, context: Any) -> bytes:
        service = request[2:].decode()
        status = self.health(service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service {service}")
        return bytes([8, status or 0])

    def health(self, service: str) -> int | None:
        return 1 if service in SERVICES else None

    def metrics(self) -> str:
        lines = [
            f"request_input_tokens_sum {self.tokens['prompt_tokens']}",
            f"request_output_tokens_sum {self.tokens['completion_tokens']}",
        ]
        for (client, target), count in self.requests.items():
            lines.append(f'request_total{{model_name="{client}",target_model_name="{target}"}} {count}')
        return "\n".join([*lines, ""])

    async def page(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            body = self.metrics().encode()
            writer.write(
                b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body) + body
            )
            await writer.drain()
        writer.close()

    def handler(self) -> grpc.GenericRpcHandler:
        process = grpc.stream_stream_rpc_method_handler(self.process)
        return grpc.method_handlers_generic_handler(
            "envoy.service.ext_proc.v3.ExternalProcessor", {"Process": process}
        )

    def health_handler(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler(
            "grpc.health.v1.Health", {"Check": grpc.unary_unary_rpc_method_handler(self.check)}
        )


def body_answer(kind: str, data: bytes, end: bool) -> Response:
    response = Response()
    streamed = getattr(response, kind).response.body_mutation.streamed_response
    streamed.body, streamed.end_of_stream = data, end
    return response


def _value(pattern: str, page: str) -> str:
    found = re.search(pattern, page)
    assert found is not None, pattern
    return found[1]


def in_process(kind: type[Picker], credentials: grpc.ServerCredentials) -> Launch:
    """Serves a picker of this kind in this process, with these for groups that want TLS."""

    @asynccontextmanager
    async def launch(name: str, group: Group, folder: Path) -> AsyncIterator[Place]:
        picker = kind(folder, group.flags)
        server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1), ("grpc.so_reuseport", 0)])
        server.add_generic_rpc_handlers((picker.handler(), picker.health_handler()))
        tls = group.tls and picker.alpn
        port = (
            server.add_secure_port("127.0.0.1:0", credentials)
            if tls
            else server.add_insecure_port("127.0.0.1:0")
        )
        health = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        page = await asyncio.start_server(picker.page, "127.0.0.1", 0)
        watching = asyncio.create_task(picker.watch())
        try:
            yield Place(
                f"127.0.0.1:{port}",
                group.tls,
                f"127.0.0.1:{health}",
                f"http://127.0.0.1:{page.sockets[0].getsockname()[1]}/metrics",
            )
        finally:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching
            page.close()
            await server.stop(0)

    return launch
