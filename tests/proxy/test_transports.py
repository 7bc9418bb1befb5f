"""Other ways to connect than plain IPv4 HTTP: tunnels, TLS, IPv6, names, credentials."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from pointsman.errors import SettingsError
from pointsman.testing.client import ASK, ASK_STREAM, RawClient, message
from pointsman.testing.serving import endings, in_flight, serving
from pointsman.testing.upstream import LAST_CHUNK, SSE_HEAD, End, FakeUpstream, event, reply

UPGRADE = message(
    "GET", "/v1/realtime?model=m", None, "connection: Upgrade", "upgrade: websocket", "sec-websocket-key: a"
)
SWITCH = (
    b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: Upgrade\r\n"
    b"sec-websocket-accept: b\r\n\r\n"
)

# -- tunnels


async def test_an_upgraded_connection_carries_bytes_both_ways() -> None:
    gate, over = asyncio.Event(), asyncio.Event()
    script = [SWITCH + b"first", gate, b"\x82\x03abc", over, End.CLOSE]
    async with FakeUpstream(script) as engine, serving(engine) as app, RawClient(app.port) as client:
        client.send(UPGRADE)
        request = await engine.request()
        assert (request.headers["upgrade"], request.headers["connection"]) == ("websocket", "upgrade")
        assert (request.target, request.headers["sec-websocket-key"]) == ("/v1/realtime?model=m", "a")
        head = await client.head()
        assert (head.status, head.headers["connection"].lower()) == (101, "upgrade")
        assert head.headers["sec-websocket-accept"] == "b"
        assert await client.read(5) == b"first"
        for payload in (b"GET / HTTP/1.1\r\n\r\n", bytes(range(256)) * 300):
            client.send(payload)
            got = b""
            while len(got) < len(payload):
                got += await asyncio.wait_for(request.tunnelled.get(), 5)
            assert got == payload
        gate.set()
        assert await client.read(5) == b"\x82\x03abc"
        over.set()
        assert await client.closed() == b""
        assert await in_flight(app) == 0
        assert await endings(app) == {"ok": 1}


async def test_bytes_sent_ahead_of_the_switch_go_through_the_tunnel() -> None:
    gate = asyncio.Event()
    async with FakeUpstream([gate, SWITCH, asyncio.Event()]) as engine, serving(engine) as app:
        async with RawClient(app.port) as client:
            client.send(UPGRADE, b"ahead")
            request = await engine.request()
            gate.set()
            assert (await client.head()).status == 101
            assert await asyncio.wait_for(request.tunnelled.get(), 5) == b"ahead"
            client.leave()
            await asyncio.wait_for(request.gone.wait(), 5)
        assert await in_flight(app) == 0
        assert await endings(app) == {"ok": 1}


async def test_an_endpoint_may_decline_to_switch() -> None:
    async with FakeUpstream([reply(b"[1]")]) as engine, serving(engine) as app, RawClient(app.port) as client:
        h2c = message(
            "POST",
            "/v1/completions",
            {"model": "m"},
            "connection: Upgrade, HTTP2-Settings",
            "upgrade: h2c",
            "http2-settings: AAMAAABk",
        )
        for _ in range(2):
            assert (await client.ask(h2c)).body == b"[1]"
        assert "http2-settings" not in engine.requests[0].names


async def test_a_tunnel_outlives_the_timeouts_of_answers() -> None:
    limits = {"between_bytes_timeout_s": 0.2, "first_byte_timeout_s": 0.2}
    gate = asyncio.Event()
    async with (
        FakeUpstream([SWITCH, gate, b"late"]) as engine,
        serving(engine, upstream=limits) as app,
        RawClient(app.port) as client,
    ):
        client.send(UPGRADE)
        assert (await client.head()).status == 101
        asyncio.get_running_loop().call_later(0.8, gate.set)
        assert await client.read(4) == b"late"


# -- TLS


@dataclass
class Certificate:
    cert: str
    key: str

    def server(self) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.cert, self.key)
        return context

    def client(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.cert)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    """A throw-away certificate for localhost and 127.0.0.1, its own authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    cert = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    folder: Path = tmp_path_factory.mktemp("tls")
    (folder / "cert.pem").write_bytes(cert.public_bytes(serialization.Encoding.PEM))
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "key.pem").write_bytes(private)
    return Certificate(str(folder / "cert.pem"), str(folder / "key.pem"))


async def test_clients_can_be_served_over_tls(certificate: Certificate) -> None:
    tls = {"tls_cert": certificate.cert, "tls_key": certificate.key}
    async with FakeUpstream([reply(bytes(300_000))]) as engine, serving(engine, server=tls) as app:
        async with RawClient(app.port, tls=certificate.client()) as client:
            assert client.transport.get_extra_info("ssl_object").selected_alpn_protocol() in (
                None,
                "http/1.1",
            )
            for _ in range(3):
                assert len((await client.ask()).body) == 300_000
        assert engine.requests[0].headers["x-forwarded-proto"] == "https"
        assert await endings(app) == {"ok": 3}


async def test_plain_http_on_a_tls_port_harms_nobody(certificate: Certificate) -> None:
    tls = {"tls_cert": certificate.cert, "tls_key": certificate.key}
    async with FakeUpstream() as engine, serving(engine, server=tls) as app:
        async with RawClient(app.port) as client:
            client.send(ASK)
            await client.closed()
        async with RawClient(app.port, tls=certificate.client()) as client:
            assert (await client.ask()).status == 200
        assert len(engine.requests) == 1


async def test_endpoints_can_be_reached_over_tls(certificate: Certificate) -> None:
    async with FakeUpstream([SSE_HEAD, event("x"), LAST_CHUNK], tls=certificate.server()) as engine:
        endpoint = {"url": engine.url, "tls_ca": certificate.cert}
        async with serving(endpoint) as app, RawClient(app.port) as client:
            for _ in range(3):
                assert (await client.ask(ASK_STREAM)).body == b"data: x\n\n"
            assert len({request.connection for request in engine.requests}) == 1
            assert {probe.target for probe in engine.probes} == {"/v1/models", "/metrics"}


async def test_leaving_a_tls_stream_frees_a_tls_endpoint(certificate: Certificate) -> None:
    tls = {"tls_cert": certificate.cert, "tls_key": certificate.key}
    script = [SSE_HEAD, event("x"), asyncio.Event()]
    async with (
        FakeUpstream(script, tls=certificate.server()) as engine,
        serving({"url": engine.url, "tls_verify": False}, server=tls) as app,
    ):
        async with RawClient(app.port, tls=certificate.client()) as client:
            client.send(ASK_STREAM)
            await client.head()
            client.leave()
            await asyncio.wait_for(engine.requests[0].gone.wait(), 5)
        assert await in_flight(app) == 0
        assert await endings(app) == {"cancelled": 1}


async def test_a_cut_tls_stream_is_noticed(certificate: Certificate) -> None:
    tls = {"tls_cert": certificate.cert, "tls_key": certificate.key}
    script = [b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n", b"half", End.RESET]
    async with (
        FakeUpstream(script) as engine,
        serving(engine, server=tls) as app,
        RawClient(app.port, tls=certificate.client()) as client,
    ):
        assert not (await client.ask()).complete


async def test_an_endpoint_whose_certificate_nobody_vouches_for_is_not_used(certificate: Certificate) -> None:
    async with FakeUpstream(tls=certificate.server()) as engine:
        async with serving(engine.url) as app, RawClient(app.port) as client:
            assert (await client.ask()).status == 502
            assert not engine.requests
        async with serving({"url": engine.url, "tls_verify": False}) as app, RawClient(app.port) as client:
            assert (await client.ask()).status == 200


async def test_a_certificate_that_cannot_be_read_names_the_setting(tmp_path: Path) -> None:
    (tmp_path / "bad.pem").write_text("nonsense")
    bad = str(tmp_path / "bad.pem")
    with pytest.raises(SettingsError, match=r"server\.tls_cert"):
        async with serving("http://127.0.0.1:9", server={"tls_cert": bad, "tls_key": bad}):
            pass


# -- addresses and names


def has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as sock:
        sock.bind(("::1", 0))
        return True
    return False


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
async def test_ipv6_on_both_sides() -> None:
    async with FakeUpstream(host="::1") as engine, serving(engine, server={"host": "::1"}) as app:
        async with RawClient(app.port, "::1") as client:
            assert (await client.ask()).status == 200
        assert engine.requests[0].headers["host"] == f"[::1]:{engine.port}"
        assert engine.requests[0].headers["x-forwarded-for"] == "::1"


async def test_endpoints_can_be_given_by_host_name() -> None:
    async with FakeUpstream() as engine:
        url = f"http://localhost:{engine.port}"
        async with serving(url) as app, RawClient(app.port) as client:
            assert (await client.ask()).status == 200
            assert engine.requests[0].headers["host"] == f"localhost:{engine.port}"


# -- credentials


@pytest.fixture
def key_in_environment(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ENGINE_B_KEY", "secret-b")
    return "ENGINE_B_KEY"


async def test_each_endpoint_gets_its_own_credentials_for_requests_and_metrics(
    key_in_environment: str,
) -> None:
    async with FakeUpstream() as a, FakeUpstream() as b, FakeUpstream() as c:
        given = (
            {"url": a.url, "api_key": "secret-a"},
            {"url": b.url, "api_key_env": key_in_environment, "headers": {"X-Tenant": "blue"}},
            {"url": c.url},
        )
        async with serving(*given) as app, RawClient(app.port) as client:
            for _ in range(3):
                ask = message(
                    "POST",
                    "/v1/completions",
                    {"model": "m"},
                    "Authorization: Bearer client's",
                    "x-tenant: red",
                )
                assert (await client.ask(ask)).status == 200
        for engine, key, tenant in ((a, "secret-a", "red"), (b, "secret-b", "blue"), (c, "client's", "red")):
            request = engine.requests[0]
            assert request.headers["authorization"] == f"Bearer {key}"
            assert (request.headers["x-tenant"], request.names.count("authorization")) == (tenant, 1)
        for engine, key in ((a, "Bearer secret-a"), (b, "Bearer secret-b"), (c, None)):
            assert {probe.target for probe in engine.probes} == {"/v1/models", "/metrics"}
            assert {probe.headers.get("authorization") for probe in engine.probes} == {key}


async def test_credentials_are_not_shown_on_the_admin_port() -> None:
    async with (
        FakeUpstream() as engine,
        serving({"url": engine.url, "api_key": "secret-a"}) as app,
        RawClient(app.admin_port) as client,
    ):
        for path in ("/settings", "/endpoints", "/metrics", "/decisions"):
            assert b"secret-a" not in (await client.ask(message("GET", path))).body


async def test_metrics_may_be_somewhere_else() -> None:
    async with FakeUpstream() as engine, FakeUpstream() as exporter:
        endpoint = {"url": engine.url, "metrics_url": f"{exporter.url}/engine-1/metrics"}
        async with serving(endpoint) as app, RawClient(app.port) as client:
            assert (await client.ask()).status == 200
        assert {probe.target for probe in exporter.probes} == {"/engine-1/metrics"}
        assert {probe.target for probe in engine.probes} == {"/v1/models"}


def test_a_url_with_credentials_in_it_is_refused() -> None:
    with pytest.raises(SettingsError, match="credentials"):
        asyncio.run(_serve_once("http://user:pass@127.0.0.1:9"))


async def _serve_once(url: str) -> None:
    async with serving(url):
        pass
