"""What a decision of the fast lane costs: CPU time of the picker's process for one question of Envoy's.

``python bench/micro/fast_lane.py`` starts `pointsman envoy --picker-only --fast-lane` on one core, asks it
over its unix socket from another as Envoy does (the whole request, 16 connections, requests that share most
of their prompt), and divides the picker's user and system time by the decisions: median and range of
``--rounds``. The ends of the requests are told over the access log service in batches, in a second
measurement. Run it on a machine with nothing else to do.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from pointsman.testing.upstream import FakeUpstream

TICKS_S = os.sysconf("SC_CLK_TCK")
PICKER_CORE, CLIENT_CORE = 0, 1
CONNECTIONS = 16


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_S


def question(prompt_bytes: int, number: int) -> bytes:
    """As Envoy's ext_authz filter sends it."""
    text = "".join(f"{n:07x} " for n in range(prompt_bytes // 8 - 4)) + f"{number:032x}"
    body = json.dumps({"model": "m", "prompt": text, "stream": True, "max_tokens": 100}).encode()
    head = (
        "POST /decide/v1/completions HTTP/1.1\r\nhost: picker\r\ncontent-type: application/json\r\n"
        f"x-request-id: {number:08x}-0000-4000-8000-000000000000\r\nx-envoy-internal: true\r\n"
        f"x-forwarded-for: 10.0.0.1\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def ask(path: str, questions: list[bytes]) -> list[str]:
    """Names of the flights, each question answered before the connection's next."""
    flights: list[str] = []

    async def connection(mine: list[bytes]) -> None:
        reader, writer = await asyncio.open_unix_connection(path)
        for each in mine:
            writer.write(each)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            flights.append(head.partition(b"x-pointsman-flight: ")[2].partition(b"\r\n")[0].decode())
        writer.close()

    await asyncio.gather(*(connection(questions[n::CONNECTIONS]) for n in range(CONNECTIONS)))
    return flights


async def tell(path: str, ids: list[str], flights: list[str], upstream: str) -> None:
    """The ends, as Envoy's access log: fifty in a message."""
    import grpc
    from envoy.service.accesslog.v3.als_pb2 import StreamAccessLogsMessage

    messages = []
    for at in range(0, len(flights), 50):
        message = StreamAccessLogsMessage()
        for flight, request_id in zip(flights[at : at + 50], ids[at : at + 50], strict=True):
            entry = message.http_logs.log_entry.add()
            common = entry.common_properties
            host, _, port = upstream.rpartition(":")
            common.upstream_remote_address.socket_address.address = host
            common.upstream_remote_address.socket_address.port_value = int(port)
            common.duration.FromMilliseconds(1500)
            common.metadata.filter_metadata["envoy.filters.http.ext_authz"]["x-pointsman-flight"] = flight
            entry.request.request_id = request_id
            entry.response.response_code.value = 200
        messages.append(message.SerializeToString())
    async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
        call = channel.stream_unary("/envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs")
        await call(iter(messages))


async def measure(prompt_bytes: int, requests: int, rounds: int, endpoints: int, preset: str) -> None:
    upstreams = [FakeUpstream() for _ in range(endpoints)]
    for upstream in upstreams:
        await upstream.start()
    with TemporaryDirectory(prefix="pointsman-") as folder:
        process = await asyncio.create_subprocess_exec(
            *("taskset", "-c", str(PICKER_CORE), sys.executable, "-m", "pointsman", "envoy"),
            *("--picker-only", "--fast-lane", "--sockets", folder, "--admin-port", "0"),
            *("--set", "metrics.interval_s=60", "--set", "metrics.idle_interval_s=60"),
            *("--set", f"scheduling.preset={preset}"),
            *(upstream.url for upstream in upstreams),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        assert process.stdout
        try:
            assert b"ready" in await process.stdout.readline()
            decided, told = [], []
            for number in range(rounds + 1):
                lead = number * requests
                questions = [question(prompt_bytes, lead + n) for n in range(requests)]
                before = cpu_s(process.pid)
                flights = await ask(f"{folder}/picker.sock", questions)
                between = cpu_s(process.pid)
                ids = [f"{int(f, 16) - 1:08x}-0000-4000-8000-000000000000" for f in flights]
                await tell(f"{folder}/control.sock", ids, flights, upstreams[0].name)
                if number:  # the first one fills the index
                    decided.append((between - before) / requests * 1e6)
                    told.append((cpu_s(process.pid) - between) / requests * 1e6)
        finally:
            process.terminate()
            await process.wait()
            for upstream in upstreams:
                await upstream.stop()
    print(f"{preset:12} {endpoints:3} endpoints, prompt {prompt_bytes:6} B:", end=" ")
    print(f"{shown(decided)} us a decision, {shown(told)} us an end told", flush=True)


def shown(values: list[float]) -> str:
    return f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    os.sched_setaffinity(0, {CLIENT_CORE})
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, one core each")
    for preset, endpoints, prompt in (
        ("round-robin", 4, 512),
        ("least-cost", 4, 512),
        ("least-cost", 4, 32_768),
        ("least-cost", 20, 32_768),
    ):
        asyncio.run(measure(prompt, args.requests, args.rounds, endpoints, preset))


if __name__ == "__main__":
    main()
