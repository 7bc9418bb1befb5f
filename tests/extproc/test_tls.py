"""TLS of the picker's ports, with grpcio and a plain TLS client as peers."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import grpc
import pytest

from pointsman.errors import SettingsError
from pointsman.extproc.grpc import GrpcServer, unary
from pointsman.extproc.tls import from_directory, self_signed, write_self_signed

SERVICES = {"/t.T/Reverse": unary(lambda data: data[::-1])}


def make(directory: Path) -> bytes:
    """A new certificate in a directory."""
    write_self_signed(directory / "tls.crt", directory / "tls.key")
    return (directory / "tls.crt").read_bytes()


async def call(port: int, certificate: bytes) -> bytes:
    credentials = grpc.ssl_channel_credentials(certificate)
    async with grpc.aio.secure_channel(f"localhost:{port}", credentials) as channel:
        return await channel.unary_unary("/t.T/Reverse")(b"abc", timeout=10)


async def shake_hands(port: int) -> tuple[bytes | None, str | None]:
    """The certificate and protocol that a server shows."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    shown = writer.get_extra_info("ssl_object")
    try:
        return shown.getpeercert(binary_form=True), shown.selected_alpn_protocol()
    finally:
        writer.transport.abort()


async def test_a_certificate_from_files_serves(tmp_path: Path) -> None:
    pem = make(tmp_path)
    server = GrpcServer(SERVICES)
    port = await server.start(tls=from_directory(tmp_path).context)
    assert await call(port, pem) == b"cba"
    server.close()


async def test_a_self_signed_certificate_encrypts_and_agrees_on_http2() -> None:
    server = GrpcServer(SERVICES)
    port = await server.start(tls=self_signed())
    shown, protocol = await shake_hands(port)
    assert shown
    assert protocol == "h2"
    server.close()


async def test_changed_files_serve_new_connections(tmp_path: Path) -> None:
    old = make(tmp_path)
    certificate = from_directory(tmp_path)
    server = GrpcServer(SERVICES)
    port = await server.start(tls=certificate.context)
    assert not certificate.reload()
    new = make(tmp_path)
    assert certificate.reload()
    assert not certificate.reload()
    assert (await shake_hands(port))[0] == ssl.PEM_cert_to_DER_cert(new.decode())
    assert new != old
    assert await call(port, new) == b"cba"
    server.close()


async def test_files_half_replaced_change_nothing(tmp_path: Path) -> None:
    old = make(tmp_path)
    certificate = from_directory(tmp_path)
    server = GrpcServer(SERVICES)
    port = await server.start(tls=certificate.context)
    key = (tmp_path / "tls.key").read_bytes()
    make(tmp_path)
    new_key = (tmp_path / "tls.key").read_bytes()
    (tmp_path / "tls.key").write_bytes(key)  # the certificate is there already, its key not yet
    assert not certificate.reload()
    assert await call(port, old) == b"cba"
    (tmp_path / "tls.key").unlink()
    assert not certificate.reload()
    (tmp_path / "tls.key").write_bytes(new_key)
    assert certificate.reload()
    server.close()


def test_files_that_cannot_be_used_name_themselves(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"tls\.crt"):
        from_directory(tmp_path)


def test_a_key_is_its_owners(tmp_path: Path) -> None:
    make(tmp_path)
    assert (tmp_path / "tls.key").stat().st_mode & 0o077 == 0
