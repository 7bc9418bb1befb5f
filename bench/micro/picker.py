"""CPU time of one request through the endpoint picker's protocol: messages in, decided, messages out.

``python bench/micro/picker.py`` prints, per prompt size and pool, the mean over some thousand requests.
Bodies come in pieces of 16 KiB, as Envoy sends them; gRPC and sockets are not in it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence

from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

from pointsman.testing.picking import CHAT, Stage

PIECE_BYTES = 16 * 1024
CASES = ((500, 3, ("unseen", "seen")), (32 * 1024, 3, ("unseen", "seen")), (400_000, 100, ("unseen",)))
"""Bytes of prompt, endpoints, and how responses go."""
HEADERS = {
    ":method": "POST",
    ":path": CHAT,
    ":authority": "gateway.example",
    ":scheme": "http",
    "content-type": "application/json",
    "user-agent": "curl/8",
    "accept": "*/*",
    "x-forwarded-proto": "http",
    "x-request-id": "5b0f6f0c-8d3e-4f6a-9d0f-000000000000",
}


class Sink:
    """A stream whose answers go nowhere."""

    paused = False

    def send(self, message: bytes) -> None:
        pass

    def finish(self, status: int = 0, message: str = "") -> None:
        pass


def _head(headers: dict[str, str], of_request: bool) -> bytes:
    message = pb.ProcessingRequest()
    http = message.request_headers if of_request else message.response_headers
    for name, value in headers.items():
        header = http.headers.headers.add()
        header.key, header.raw_value = name, value.encode()
    if of_request:
        message.protocol_config.request_body_mode = message.protocol_config.response_body_mode = 4
    return bytes(message.SerializeToString())


def request_messages(prompt_bytes: int) -> list[bytes]:
    """Headers and body of a chat request."""
    chat = {"model": "m", "messages": [{"role": "user", "content": "x" * prompt_bytes}]}
    body = json.dumps(chat).encode()
    pieces = [body[i : i + PIECE_BYTES] for i in range(0, len(body), PIECE_BYTES)]
    messages = [
        pb.ProcessingRequest(request_body=pb.HttpBody(body=piece, end_of_stream=piece is pieces[-1]))
        for piece in pieces
    ]
    return [_head(HEADERS, True), *(message.SerializeToString() for message in messages)]


def response_messages() -> list[bytes]:
    usage = b'{"choices":[],"usage":{"prompt_tokens":8000,"completion_tokens":10}}'
    body = pb.ProcessingRequest(response_body=pb.HttpBody(body=usage, end_of_stream=True))
    head = _head({":status": "200", "content-type": "application/json"}, False)
    return [head, body.SerializeToString()]


def measure(prompt_bytes: int, endpoints: int, responses: str, policy: str, rounds: int) -> float:
    """Microseconds of CPU for each request."""
    hosts = [f"10.0.0.{i + 1}:8000" for i in range(endpoints)]
    stage = Stage(hosts, policy=policy, responses=responses)
    asked = request_messages(prompt_bytes)
    answered = response_messages() if responses == "seen" else []

    def run(count: int, messages: Sequence[bytes]) -> None:
        for _ in range(count):
            process = stage.processor(Sink(), {})
            for message in messages:
                process.message(message)
            stage.now_s += 0.01
            if len(stage.completions) >= 50:
                stage.completions.close()

    run(100, [*asked, *answered])
    before = time.process_time()
    run(rounds, [*asked, *answered])
    return (time.process_time() - before) / rounds * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", default="least-cost")
    parser.add_argument("--rounds", type=int, default=2000)
    args = parser.parse_args()
    for prompt_bytes, endpoints, ways in CASES:
        for responses in ways:
            us = measure(prompt_bytes, endpoints, responses, args.policy, args.rounds)
            where = f"{prompt_bytes:>7} B of prompt, {endpoints:>3} endpoints"
            print(f"{where}, responses {responses:6}: {us:6.0f} us")


if __name__ == "__main__":
    main()
