"""Microseconds to parse a request, and to read the usage of a response: median and p99.

python bench/micro/parse.py
"""

from __future__ import annotations

import base64
import json
import random
import time
from collections.abc import Callable

from pointsman import api

ROUNDS = 2000
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "where", "one", "began"]


def text(rng: random.Random, size: int) -> str:
    """Prose of ``size`` characters with a quote and a line break now and then."""
    words = []
    while size > 0:
        word = rng.choice(WORDS) if rng.random() > 0.03 else rng.choice(['"so"', "\n", "x = [1, 2]"])
        words.append(word)
        size -= len(word) + 1
    return " ".join(words)


def turns(rng: random.Random, count: int, size: int) -> list[dict[str, object]]:
    roles = ["system", *["user", "assistant"] * count][:count]
    return [{"role": role, "content": text(rng, size // count)} for role in roles]


def chat(messages: list[dict[str, object]], **fields: object) -> bytes:
    return json.dumps(
        {"model": "m", "messages": messages, "stream": True, "max_tokens": 256} | fields
    ).encode()


def bodies(rng: random.Random) -> dict[str, tuple[str, bytes]]:
    image = "data:image/png;base64," + base64.b64encode(rng.randbytes(150_000)).decode()
    part = [{"type": "text", "text": "what is it?"}, {"type": "image_url", "image_url": {"url": image}}]
    tool = {"type": "function", "function": {"name": "get_weather", "arguments": '{"city_name": "Bern"}'}}
    agent = turns(rng, 40, 32_000)
    for turn in agent[2::4]:
        turn["tool_calls"] = [tool]
    ids = [rng.randrange(128_000) for _ in range(7200)]
    chat_path, text_path = "/v1/chat/completions", "/v1/completions"
    return {
        "0.5 KB chat": (chat_path, chat(turns(rng, 2, 350))),
        "32 KB chat": (chat_path, chat(turns(rng, 2, 32_000))),
        "32 KB chat, 40 turns with tools": (chat_path, chat(agent)),
        "32 KB completion": (text_path, json.dumps({"model": "m", "prompt": text(rng, 32_000)}).encode()),
        "7,200 token ids": (text_path, json.dumps({"model": "m", "prompt": ids}).encode()),
        "400 KB chat": (chat_path, chat(turns(rng, 2, 400_000))),
        "200 KB chat with an image": (chat_path, chat([{"role": "user", "content": part}])),
        "32 KB Responses": (
            "/v1/responses",
            json.dumps({"model": "m", "instructions": "Be brief.", "input": turns(rng, 2, 32_000)}).encode(),
        ),
        "32 KB Anthropic messages": ("/v1/messages", chat(turns(rng, 4, 32_000)[1:], system="Be brief.")),
    }


def tails(rng: random.Random) -> dict[str, tuple[str, bytes]]:
    usage = {
        "prompt_tokens": 12,
        "total_tokens": 20,
        "completion_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    chunk = {"id": "c", "choices": [{"index": 0, "delta": {"content": "word"}}], "usage": None}
    events = [json.dumps(chunk)] * 120 + [json.dumps(chunk | {"choices": [], "usage": usage}), "[DONE]"]
    framed = b"".join(
        b"%x\r\n%b\r\n" % (len(e), e) for e in (f"data: {event}\n\n".encode() for event in events)
    )
    body = {"id": "c", "choices": [{"message": {"content": text(rng, 14_000)}}], "usage": usage}
    return {
        "usage of a chunked stream": ("/v1/chat/completions", (framed + b"0\r\n\r\n")[-16384:]),
        "usage of a JSON response": ("/v1/chat/completions", json.dumps(body).encode()[-16384:]),
        "no usage in 16 KB": ("/v1/chat/completions", text(rng, 16_384).encode()),
    }


def measure(call: Callable[[], object]) -> tuple[float, float]:
    """Median and p99 in microseconds, the clock's own share (about 0.1 us) included."""
    spent = []
    clock = time.perf_counter_ns
    for _ in range(ROUNDS):
        start = clock()
        call()
        spent.append(clock() - start)
    spent.sort()
    return spent[ROUNDS // 2] / 1000, spent[ROUNDS * 99 // 100] / 1000


def main() -> None:
    rng = random.Random(1)
    print(f"{'':34}{'bytes':>8}{'median us':>12}{'p99 us':>10}")
    headers = {"content-type": "application/json"}
    for name, (path, body) in bodies(rng).items():
        median, p99 = measure(lambda path=path, body=body: api.find(path).parse("r1", path, headers, body))  # type: ignore[misc]
        print(f"{name:34}{len(body):>8}{median:>12.2f}{p99:>10.2f}")
    for name, (path, tail) in tails(rng).items():
        median, p99 = measure(lambda path=path, tail=tail: api.find(path).usage(tail))  # type: ignore[misc]
        print(f"{name:34}{len(tail):>8}{median:>12.2f}{p99:>10.2f}")


if __name__ == "__main__":
    main()
