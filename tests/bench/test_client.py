"""The client against a scripted server on loopback: every request ends once, and says how."""

import asyncio
import gc
import ssl
import time
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from itertools import islice

import pytest

from pointsman.bench.client import Client, Target
from pointsman.bench.connection import room_for
from pointsman.bench.load import open_loop
from pointsman.bench.pace import Pace
from pointsman.bench.workloads import Call, SharedPrefix
from pointsman.errors import SettingsError
from pointsman.types import Usage

CALL = Call("the cat sat", 3, 4)


@asynccontextmanager
async def client(url, **fields):
    made = Client(Target(url=url, **({"model": "m"} | fields)), Pace(time.perf_counter))
    try:
        yield made
    finally:
        await made.close()


async def send(server, script, **fields):
    server.script = script
    async with client(server.url, **fields) as made:
        return await made.send(CALL, made._pace.now())


async def test_a_complete_stream_is_recorded(server, say):
    answer = say.sse(say.token(), say.token(), say.usage(100, 2, 64), head=b"x-pointsman-endpoint: gpu-7\r\n")
    record = await send(server, lambda n, body: [answer])
    assert (record.error, record.status, record.events, record.endpoint) == ("", 200, 2, "gpu-7")
    assert record.usage == Usage(100, 2, 64)
    assert record.due_s <= record.sent_s <= record.first_s <= record.last_s <= record.end_s


async def test_the_request_asks_for_a_stream_of_exactly_the_output_length(server):
    await send(
        server, lambda n, body: [], timeout_s=0.2, extra={"top_p": 0.5}, api_key="k", headers=(("a-b", "c"),)
    )
    assert server.bodies == [
        {
            "model": "m",
            "prompt": "the cat sat",
            "max_tokens": 4,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
            "top_p": 0.5,
        }
    ]
    assert server.heads[0].startswith("POST /v1/completions HTTP/1.1\r\n")
    assert "\r\nAuthorization: Bearer k\r\n" in server.heads[0]
    assert "\r\na-b: c\r\n" in server.heads[0]


async def test_chat_sends_messages(server, say):
    word = {"choices": [{"delta": {"role": "assistant", "content": "a"}}]}
    record = await send(server, lambda n, body: [say.sse(word)], api="chat", ignore_eos=False)
    assert record.error == ""
    assert server.bodies[0]["messages"] == [{"role": "user", "content": "the cat sat"}]
    assert "ignore_eos" not in server.bodies[0]
    assert server.heads[0].startswith("POST /v1/chat/completions ")


@pytest.mark.parametrize(("suffix", "path"), [("/v1", "/v1/completions"), ("/a/b/", "/a/b/v1/completions")])
async def test_a_path_in_the_url_leads_all_paths(server, say, suffix, path):
    async with client(server.url + suffix) as made:
        await made.send(CALL, 0.0)
    assert server.heads[0].startswith(f"POST {path} HTTP/1.1")


async def test_a_stream_ending_with_the_connection_is_complete(server, say):
    body = b"HTTP/1.1 200 OK\r\n\r\ndata: " + b'{"choices":[{"text":"a"}]}\n\ndata: [DONE]\n\n'
    record = await send(server, lambda n, b: [body, say.CLOSE])
    assert (record.error, record.events) == ("", 1)


ENDINGS = {
    "status 503": lambda say: [say.plain(503, {"error": {"message": "full"}})],
    "status 404": lambda say: [say.plain(404, {"error": {"message": "no model"}})],
    "reset": lambda say: [say.start_sse(), say.event(say.token()), say.CLOSE],
    "cut off": lambda say: [say.start_sse() + say.event(say.token()) + b"0\r\n\r\n"],
    "error in stream": lambda say: [say.sse(say.token(), {"error": {"message": "engine died"}})],
    "no tokens": lambda say: [say.plain(200, {"choices": [{"text": "all at once"}]})],
    "protocol": lambda say: [b"SSH-2.0-OpenSSH_9.9\r\n"],
    "timeout": lambda say: [say.start_sse() + say.event(say.token()), asyncio.Event()],
}


@pytest.mark.parametrize("kind", ENDINGS)
async def test_failures_are_told_apart(server, say, kind):
    record = await send(
        server, lambda n, body: ENDINGS[kind](say), timeout_s=0.3 if kind == "timeout" else 10.0
    )
    assert record.error == kind
    assert record.detail
    assert record.end_s >= record.sent_s


async def test_a_closed_port_is_a_connect_failure(server):
    await server.stop()
    async with client(server.url) as made:
        record = await made.send(CALL, 0.0)
    assert (record.error, record.status) == ("connect", 0)


async def test_no_answer_before_the_connection_closes_is_a_reset(server, say):
    record = await send(server, lambda n, body: [say.CLOSE])
    assert record.error == "reset"
    assert len(server.bodies) == 1


async def test_connections_are_reused(server):
    async with client(server.url) as made:
        for _ in range(20):
            assert (await made.send(CALL, 0.0)).error == ""
    assert server.connections == 1


async def test_a_connection_the_server_closed_while_idle_is_replaced_unseen(server, say):
    good = say.sse(say.token())
    server.script = lambda n, body: [good] if n != 2 else [say.CLOSE]
    async with client(server.url) as made:
        records = [await made.send(CALL, 0.0) for _ in range(2)]
    assert [r.error for r in records] == ["", ""]
    assert (server.connections, len(server.bodies)) == (2, 3)


async def test_as_many_connections_as_requests_at_once(server, say):
    gate = asyncio.Event()
    server.script = lambda n, body: (gate.set() if n == 300 else None, [gate, say.sse(say.token())])[1]
    async with client(server.url) as made, asyncio.timeout(20):
        records = await asyncio.gather(*[made.send(CALL, 0.0) for _ in range(300)])
    assert [r.error for r in records] == [""] * 300
    assert server.connections == 300


async def test_open_loop_ttft_counts_from_due_when_the_server_stalls(server, say):
    """The server answers nobody until the last request is there: a client that waited would never send it."""
    gate = asyncio.Event()
    server.script = lambda n, body: (gate.set() if n == 5 else None, [gate, say.sse(say.token())])[1]
    records = []
    async with client(server.url) as made, asyncio.timeout(20):
        calls = SharedPrefix(groups=2).calls(0)
        await open_loop(made.send, calls, [i * 0.05 for i in range(5)], made._pace, records.append)
    ttft = sorted((r.first_s - r.due_s for r in records), reverse=True)
    assert [t >= least for t, least in zip(ttft, (0.2, 0.15, 0.1, 0.05), strict=False)] == [True] * 4
    assert len(records) == 5


async def test_a_late_client_shows_in_ttft_from_due_and_not_in_ttft_from_sent(server):
    def slow_calls():
        for call in islice(SharedPrefix(groups=1, output_len=1).calls(0), 2):
            time.sleep(0.15)  # the client is busy: its loop stands still
            yield call

    records = []
    async with client(server.url) as made:
        await open_loop(made.send, slow_calls(), [0.0, 0.0], made._pace, records.append)
    second = max(records, key=lambda r: r.sent_s)
    assert second.first_s - second.due_s >= 0.3
    assert second.first_s - second.sent_s < 0.15


async def test_cancelling_a_run_closes_its_connections(server):
    server.script = lambda n, body: []
    async with client(server.url) as made:
        run = asyncio.create_task(made.send(CALL, 0.0))
        await server.arrived.wait()
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
    assert not made._connections._open


async def test_the_model_is_the_first_one_served(server):
    async with client(server.url, model="") as made:
        assert await made.find_model() == "tiny"
    server.script = lambda n, body: []


@pytest.mark.parametrize("models", [{"data": []}, {"error": "who are you"}])
async def test_without_a_model_the_user_must_name_one(server, say, models):
    server.models = say.plain(200, models)
    async with client(server.url, model="") as made:
        with pytest.raises(SettingsError, match="--model"):
            await made.find_model()


async def test_a_server_that_is_not_there_names_itself(server):
    await server.stop()
    async with client(server.url) as made:
        with pytest.raises(SettingsError, match=f"{server.url}: cannot connect"):
            await made.find_model()


def test_a_header_must_stay_on_its_line():
    with pytest.raises(SettingsError, match="--header"):
        Client(Target(url="http://h", headers=(("a", "b\r\nc: d"),)), Pace(time.perf_counter))


def test_too_few_open_files_is_said_before_the_run():
    with pytest.raises(SettingsError, match=r"--concurrency: 100000000 connections need .*ulimit -n"):
        room_for(100_000_000, "--concurrency")


async def test_https(server, tmp_path, say):
    certificate, key = _certificate(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    tls = await asyncio.start_server(server._accept, "127.0.0.1", 0, ssl=context)
    url = f"https://127.0.0.1:{tls.sockets[0].getsockname()[1]}"
    async with client(url, tls_verify=False) as made:
        trusting = await made.send(CALL, 0.0)
    async with client(url) as made:
        careful = await made.send(CALL, 0.0)
    tls.close()
    await tls.wait_closed()
    assert (trusting.error, trusting.events) == ("", 4)
    assert careful.error == "connect"
    gc.collect()


def _certificate(folder):
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + timedelta(days=1))
    signed = made.sign(key, hashes.SHA256())
    (folder / "cert.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    pkcs8, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "key.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, pkcs8, plain))
    return folder / "cert.pem", folder / "key.pem"
