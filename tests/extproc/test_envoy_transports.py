"""HTTP/2 and TLS on either side of a real Envoy, and certificates that change while it runs."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import h2.config
import h2.connection
import h2.events
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from pointsman.testing.client import ASK, ASK_STREAM, RawClient
from pointsman.testing.envoy import behind_envoy
from pointsman.testing.upstream import LAST_CHUNK, SSE_HEAD, FakeUpstream, event

PATIENCE_S = 15.0


class Certificate:
    """A throw-away certificate for 127.0.0.1, its own authority, in ``folder``."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.cert, self.key = str(folder / "tls.crt"), str(folder / "tls.key")
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "throw-away")])
        now = datetime.now(UTC)
        made = x509.CertificateBuilder(
            name, name, key.public_key(), x509.random_serial_number(), now - timedelta(1), now + timedelta(1)
        )
        local = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        made = made.add_extension(x509.SubjectAlternativeName(local), critical=False)
        made = made.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        signed = made.sign(key, hashes.SHA256())
        pem, kind = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        # The certificate last: Envoy reads both when its folder changes.
        for path, data in (
            (self.key, key.private_bytes(pem, kind, serialization.NoEncryption())),
            (self.cert, signed.public_bytes(pem)),
        ):
            fresh = Path(path + ".new")
            fresh.write_bytes(data)
            fresh.rename(path)
        self.der = signed.public_bytes(serialization.Encoding.DER)

    @property
    def server(self) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.cert, self.key)
        return context

    def client(self, *protocols: str) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.cert)
        if protocols:
            context.set_alpn_protocols(list(protocols))
        return context


class Http2:
    """Asks once over HTTP/2, with a library that is not ours."""

    def __init__(self) -> None:
        self.events: list[h2.events.Event] = []

    async def ask(self, port: int, body: bytes, tls: ssl.SSLContext | None = None) -> tuple[int, bytes]:
        """Status and body of the answer."""
        async with asyncio.timeout(PATIENCE_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=tls)
            try:
                return await self._ask(reader, writer, body)
            finally:
                writer.close()
                await writer.wait_closed()

    async def _ask(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes
    ) -> tuple[int, bytes]:
        connection = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        connection.initiate_connection()
        fields = {":method": "POST", ":path": "/v1/completions", ":scheme": "http", ":authority": "test"}
        connection.send_headers(1, [*fields.items(), ("content-type", "application/json")])
        status, answer, sent = 0, b"", 0
        while True:
            while sent < len(body):
                size = min(
                    connection.local_flow_control_window(1),
                    connection.max_outbound_frame_size,
                    len(body) - sent,
                )
                if size <= 0:
                    break
                connection.send_data(1, body[sent : sent + size], end_stream=sent + size == len(body))
                sent += size
            writer.write(connection.data_to_send())
            await writer.drain()
            data = await reader.read(65536)
            assert data, "the connection ended"
            for found in connection.receive_data(data):
                if isinstance(found, h2.events.ResponseReceived):
                    status = int(dict(found.headers)[":status"])
                elif isinstance(found, h2.events.DataReceived):
                    answer += found.data
                    connection.acknowledge_received_data(found.flow_controlled_length, 1)
                elif isinstance(found, h2.events.StreamReset):
                    raise AssertionError(f"reset: {found.error_code}")
                elif isinstance(found, h2.events.StreamEnded):
                    return status, answer


def completion_of(size: int) -> bytes:
    return json.dumps({"model": "m", "prompt": "x" * size}).encode()


@pytest.mark.parametrize("fast", [False, True], ids=["ext_proc", "fast-lane"])
async def test_clients_may_speak_http2_in_the_clear_and_over_tls(fast: bool, tmp_path: Path) -> None:
    certificate = Certificate(tmp_path)
    body = completion_of(8 << 20)
    async with FakeUpstream() as engine:
        async with behind_envoy(engine, fast_lane=fast) as gateway:
            status, answer = await Http2().ask(gateway.port, body)
            assert (status, json.loads(answer)["object"]) == (200, "text_completion")
        tls = {"tls_cert": certificate.cert, "tls_key": certificate.key}
        async with behind_envoy(engine, fast_lane=fast, server=tls) as gateway:
            context = certificate.client("h2")
            assert (await Http2().ask(gateway.port, completion_of(10), context))[0] == 200
            async with RawClient(gateway.port, tls=certificate.client("http/1.1")) as client:
                assert (await client.ask()).status == 200
        assert engine.requests[0].body == body
        assert len(engine.requests) == 3


async def test_a_new_certificate_is_served_as_soon_as_it_is_there(tmp_path: Path) -> None:
    first = Certificate(tmp_path)
    tls = {"tls_cert": first.cert, "tls_key": first.key}
    gate = asyncio.Event()
    script = [SSE_HEAD, event("one"), gate, event("two"), LAST_CHUNK]
    async with (
        FakeUpstream(script) as engine,
        behind_envoy(engine, server=tls) as gateway,
        RawClient(gateway.port, tls=first.client()) as running,
    ):
        running.send(ASK_STREAM)
        await running.head()
        await running.line(event("one"))
        second = Certificate(tmp_path)
        assert second.der != first.der

        async def renewed() -> bool:
            anybody = ssl.create_default_context()
            anybody.check_hostname, anybody.verify_mode = False, ssl.CERT_NONE
            async with RawClient(gateway.port, tls=anybody) as client:
                ssl_object = client.transport.get_extra_info("ssl_object")
                return bool(ssl_object.getpeercert(binary_form=True) == second.der)

        await gateway.until(renewed)
        gate.set()
        assert (await running.line(LAST_CHUNK)).endswith(event("two") + LAST_CHUNK)


async def test_endpoints_are_reached_over_tls_as_their_settings_say(tmp_path: Path) -> None:
    good, other = Certificate(tmp_path / "good"), Certificate(tmp_path / "other")
    for host, trust, status in (
        ("127.0.0.1", {"tls_ca": good.cert}, 200),
        ("localhost", {"tls_ca": good.cert}, 200),
        ("127.0.0.1", {"tls_verify": False}, 200),
        ("127.0.0.1", {"tls_ca": other.cert}, 503),
        ("localhost", {}, 503),
    ):
        async with FakeUpstream(tls=good.server) as engine:
            endpoint = {"url": f"https://{host}:{engine.port}", **trust}
            async with behind_envoy(endpoint) as gateway, gateway.client() as client:
                assert (await client.ask(ASK)).status == status, endpoint
            assert len(engine.requests) == (status == 200)
