"""One GET at a time over a kept connection: what it answers, whatever the other side does."""

from __future__ import annotations

import asyncio
import ssl
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from pointsman.config import Endpoint as Settings
from pointsman.endpoints import fetch as module
from pointsman.endpoints.fetch import Fetcher, fetch
from pointsman.endpoints.target import Target, targets_of
from pointsman.testing.upstream import End, FakeUpstream, chunk, head, reply

TIMEOUT_S = 5.0


def target_of(upstream: FakeUpstream, **fields: object) -> Target:
    return targets_of(Settings(url=upstream.url, **fields))[0]  # type: ignore[arg-type]


async def get(target: Target, timeout_s: float = TIMEOUT_S) -> tuple[int, bytes]:
    return await fetch(target, target.url, "/page", timeout_s)


class Getter:
    """A fetcher whose answers can be awaited."""

    def __init__(self, target: Target) -> None:
        self._answers: asyncio.Queue[tuple[int, bytes]] = asyncio.Queue()
        self.fetcher = Fetcher(
            target,
            target.url,
            "/page",
            TIMEOUT_S,
            lambda status, body: self._answers.put_nowait((status, body)),
        )

    async def get(self) -> tuple[int, bytes]:
        self.fetcher.get()
        return await self._answers.get()


async def test_a_connection_is_kept_from_get_to_get() -> None:
    async with FakeUpstream([reply(b"hello")]) as upstream:
        getter = Getter(target_of(upstream))
        assert [await getter.get() for _ in range(3)] == [(200, b"hello")] * 3
        assert upstream.connections == 1
        getter.fetcher.close()


async def test_a_connection_that_the_server_closed_in_between_is_replaced() -> None:
    async with FakeUpstream([reply(b"hello")]) as upstream:
        getter = Getter(target_of(upstream))
        await getter.get()
        await upstream.drop()
        assert await getter.get() == (200, b"hello")
        upstream.script = [reply(b"bye"), End.CLOSE]
        assert await getter.get() == (200, b"bye")
        assert await getter.get() == (200, b"bye")
        getter.fetcher.close()


@pytest.mark.parametrize(
    ("steps", "answer"),
    [
        ([reply(b"", 503)], (503, b"")),
        ([head(), chunk(b"ab"), chunk(b"cd"), b"0\r\n\r\n"], (200, b"abcd")),
        ([b"HTTP/1.1 100 Continue\r\n\r\n", reply(b"late")], (200, b"late")),
        ([b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok"], (200, b"ok")),
        ([b"this is not HTTP\r\n\r\n"], (0, b"broken")),
        ([b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf", End.CLOSE], (0, b"broken")),
        ([End.RESET], (0, b"broken")),
    ],
)
async def test_answers(steps: list[bytes | End], answer: tuple[int, bytes]) -> None:
    async with FakeUpstream(steps) as upstream:  # type: ignore[arg-type]
        assert await get(target_of(upstream)) == answer


async def test_nobody_listens() -> None:
    async with FakeUpstream() as upstream:
        target = target_of(upstream)
    assert await get(target) == (0, b"connect")


async def test_a_host_that_is_no_name_cannot_be_connected_to() -> None:
    target = targets_of(Settings(url=f"http://{'x' * 70}:80"))[0]
    assert await get(target) == (0, b"connect")


async def test_no_answer_in_time() -> None:
    async with FakeUpstream([asyncio.Event()]) as upstream:
        assert await get(target_of(upstream), timeout_s=0.05) == (0, b"timeout")
        request = await upstream.request()
        await request.gone.wait()


async def test_a_body_without_end_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BODY_BYTES", 10_000)

    def endless(_: object):  # type: ignore[no-untyped-def]
        yield head()
        while True:
            yield chunk(b"x" * 1000)

    async with FakeUpstream(endless) as upstream:
        assert await get(target_of(upstream)) == (0, b"broken")


async def test_bytes_that_nobody_asked_for_end_the_connection() -> None:
    more = asyncio.Event()
    async with FakeUpstream([reply(b"one"), more, b"unasked", asyncio.Event()]) as upstream:
        getter = Getter(target_of(upstream))
        assert await getter.get() == (200, b"one")
        more.set()
        await (await upstream.request()).gone.wait()
        upstream.script = [reply(b"two")]
        assert await getter.get() == (200, b"two")
        getter.fetcher.close()


async def test_credentials_and_headers_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY_OF_TEST", "from-env")
    async with FakeUpstream([reply(b"x")]) as upstream:
        await get(target_of(upstream, api_key="secret", headers={"X-Team": "a"}))
        await get(target_of(upstream, api_key_env="KEY_OF_TEST"))
        first, second = upstream.requests
    assert (first.method, first.target) == ("GET", "/page")
    assert first.headers["host"] == f"127.0.0.1:{upstream.port}"
    assert (first.headers["authorization"], first.headers["x-team"]) == ("Bearer secret", "a")
    assert second.headers["authorization"] == "Bearer from-env"


async def test_an_ipv6_address() -> None:
    async with FakeUpstream([reply(b"six")], host="::1") as upstream:
        assert await get(target_of(upstream)) == (200, b"six")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ssl.SSLContext]:
    """A self-signed certificate of 127.0.0.1, and a server's TLS settings with it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    folder = tmp_path_factory.mktemp("tls")
    pem, key_pem = folder / "cert.pem", folder / "key.pem"
    pem.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    key_pem.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem, key_pem)
    return pem, context


async def test_tls_is_checked_unless_told_otherwise(certificate: tuple[Path, ssl.SSLContext]) -> None:
    pem, context = certificate
    async with FakeUpstream([reply(b"safe")], tls=context) as upstream:
        assert await get(target_of(upstream, tls_ca=str(pem))) == (200, b"safe")
        assert await get(target_of(upstream, tls_verify=False)) == (200, b"safe")
        assert await get(target_of(upstream)) == (0, b"broken")


async def test_a_question_is_sent_with_its_body_and_the_endpoints_credentials() -> None:
    async with FakeUpstream([reply(b"{}")]) as upstream:
        answers: asyncio.Queue[tuple[int, bytes]] = asyncio.Queue()
        target = target_of(upstream, api_key="secret")
        fetcher = Fetcher(target, target.url, "/", TIMEOUT_S, lambda *answer: answers.put_nowait(answer))
        for number in range(2):
            fetcher.post("/tokenize", b'{"prompt": "%d"}' % number)
            assert await answers.get() == (200, b"{}")
        fetcher.close()
        assert upstream.connections == 1
        assert [request.body for request in upstream.requests] == [b'{"prompt": "0"}', b'{"prompt": "1"}']
        for request in upstream.requests:
            assert (request.method, request.target) == ("POST", "/tokenize")
            assert request.headers["authorization"] == "Bearer secret"
            assert request.headers["content-type"] == "application/json"


async def test_a_question_on_a_connection_that_the_server_closed_is_asked_again() -> None:
    async with FakeUpstream([reply(b"{}"), End.CLOSE]) as upstream:
        answers: asyncio.Queue[tuple[int, bytes]] = asyncio.Queue()
        target = target_of(upstream)
        fetcher = Fetcher(target, target.url, "/", TIMEOUT_S, lambda *answer: answers.put_nowait(answer))
        for _ in range(2):
            fetcher.post("/tokenize", b"{}")
            assert await answers.get() == (200, b"{}")
        fetcher.close()
        assert upstream.connections == 2
