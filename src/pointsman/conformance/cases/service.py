"""What else a picker serves: TLS, health, metrics."""

from __future__ import annotations

import asyncio
import re
import ssl
import urllib.request

import grpc
import grpc.aio

from pointsman.conformance import wire
from pointsman.conformance.case import LLMD_TESTS, PROTOCOL, case
from pointsman.conformance.checks import check, equal, fail
from pointsman.conformance.relay import unverified
from pointsman.conformance.subject import OK, SSE, Subject, completion, post

CHECK = "/grpc.health.v1.Health/Check"
SERVING = b"\x08\x01"
"""HealthCheckResponse with status SERVING."""
SERVICES = ("", "liveness", "readiness", "envoy.service.ext_proc.v3.ExternalProcessor")
INPUT, OUTPUT = r"request_(?:input|prompt)_tokens", r"request_output_tokens"
REQUESTS = r"request(?:s)?_total"
"""Names of metrics, behind a prefix of the picker's own."""


@case("tls", "By default the picker is served over TLS, with HTTP/2 by ALPN.", PROTOCOL, group="secure")
async def tls(subject: Subject) -> None:
    subject.chosen(await subject.ask())
    host, _, port = subject.place.address.rpartition(":")
    try:
        _, writer = await asyncio.open_connection(host, port, ssl=unverified())
    except OSError as exc:
        fail(f"no TLS: {exc}")
    found = writer.get_extra_info("ssl_object")
    writer.close()
    assert isinstance(found, ssl.SSLObject)
    equal("the protocol by ALPN", found.selected_alpn_protocol(), "h2")


async def _health(subject: Subject, service: str) -> bytes:
    """HealthCheckRequest{service = 1}, by hand: it has one field."""
    name = service.encode()
    request = b"\x0a" + bytes([len(name)]) + name if name else b""
    call = subject.health.unary_unary(CHECK)
    answer: bytes = await call(request, timeout=subject.patience_s, wait_for_ready=True)
    return answer


@case("health", f"The health service says SERVING for {', '.join(map(repr, SERVICES))}.", LLMD_TESTS)
async def health(subject: Subject) -> None:
    for service in SERVICES:
        try:
            equal(f"the health of {service!r}", await _health(subject, service), SERVING)
        except grpc.aio.AioRpcError as error:
            fail(f"the health of {service!r} is {error.code().name} {error.details()}")


@case("health-of-a-stranger", "The health service refuses a service that it does not know.", LLMD_TESTS)
async def health_of_a_stranger(subject: Subject) -> None:
    await health(subject)
    try:
        answer = await _health(subject, "nobody.of.This.Name")
    except grpc.aio.AioRpcError as error:
        check(error.code() is not grpc.StatusCode.UNAVAILABLE, "the health service is away")
        return
    fail(f"the health of a stranger is {answer!r}")


async def _metrics(subject: Subject) -> str:
    def fetch() -> str:
        with urllib.request.urlopen(subject.metrics_url, timeout=subject.patience_s) as page:
            return str(page.read().decode())

    try:
        return await asyncio.to_thread(fetch)
    except OSError as exc:
        fail(f"no metrics at {subject.metrics_url}: {exc}")


def _sum(page: str, name: str) -> float:
    return sum(float(value) for value in re.findall(rf"^\w*{name}_sum(?:{{.*}})? (\S+)", page, re.MULTILINE))


async def _counted(subject: Subject, headers: wire.Headers, chunks: list[bytes], **fields: object) -> None:
    """A response that reports 7 tokens in and 10 out is found in the histograms."""
    body = completion(**fields)
    before = await _metrics(subject)
    async with subject.exchange() as stream:
        subject.chosen(await stream.request(post(body), [body]))
        await stream.response_headers(headers)
        await stream.response_body(*chunks)
        await stream.half_close()
        await stream.ended()
    found = (0.0, 0.0)
    try:
        async with asyncio.timeout(subject.patience_s):
            while found != (7.0, 10.0):  # they may be a moment late
                page = await _metrics(subject)
                found = (_sum(page, INPUT) - _sum(before, INPUT), _sum(page, OUTPUT) - _sum(before, OUTPUT))
    except TimeoutError:
        fail(f"tokens in and out grew by {found[0]:g} and {found[1]:g} in the metrics, not by 7 and 10")


@case("tokens-of-a-response", "The usage of a JSON response is counted in the metrics.", LLMD_TESTS)
async def tokens_of_a_response(subject: Subject) -> None:
    usage = b'{"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 10, "total_tokens": 17}}'
    await _counted(subject, OK, [usage[:40], usage[40:]])


@case("tokens-of-events", "The usage in the last event of a stream is counted in the metrics.", LLMD_TESTS)
async def tokens_of_events(subject: Subject) -> None:
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":10,"total_tokens":17}}\n\n'
    event = b'data: {"choices":[{"text":"4"}]}\n\n'
    await _counted(subject, SSE, [event, event, usage, b"data: [DONE]\n\n"], stream=True)


@case(
    "models-in-metrics",
    "The metrics have both names of a request whose model was rewritten.",
    LLMD_TESTS,
    level="extension",  # what a picker's metrics are called is its own affair
)
async def models_in_metrics(subject: Subject) -> None:
    client, target = "asked-for-by-the-client", "adapter-b"
    body = completion(model=client)
    async with subject.exchange() as stream:
        extra = [("x-llm-d-model-name-rewrite", target)]
        subject.chosen(await stream.request(post(body, extra=extra), [body]))
        await stream.response_headers(OK)
        await stream.response_body(b"{}")
        await stream.half_close()
        await stream.ended()
    series = re.findall(rf"^\w*{REQUESTS}{{(.*)}}", await _metrics(subject), re.MULTILINE)
    check(
        any(f'"{client}"' in labels and f'"{target}"' in labels for labels in series),
        f"no series of request_total has both {client} and {target}",
    )
