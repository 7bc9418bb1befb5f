"""The requests of a soak: a steady, seeded mix, each with what a good answer to it is."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
from xxhash import xxh64_intdigest

from pointsman.sim import tokens
from pointsman.sim.formats import openai

MODEL = "granite-4.1-8b"
BLOCK_TOKENS = 16
"""Of every engine: where an answer's text begins depends on it, so that any engine gives the same answer."""
GROUPS = 16
GROUP_BYTES = 6000
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_WORDS = ("rail", "point", "signal", "track", "switch", "engine", "freight", "yard", "junction", "whistle")


@dataclass(frozen=True)
class Ask:
    """One request. ``kind`` says what the client does; ``status`` what a well engine's answer has."""

    kind: str
    path: str
    body: bytes
    stream: bool = False
    max_tokens: int = 0
    choices: int = 1
    status: int = 200
    ending: str = "ok"
    """Under which ending the gateway counts it when all goes well."""
    leave_after_chunks: int | None = None
    leave_after_s: float | None = None
    slow: bool = False
    new_connection: bool = False
    raw: bytes | None = None
    """Sent instead of a well-formed request."""

    @property
    def leaves(self) -> bool:
        """The client goes before the answer is complete."""
        return self.leave_after_chunks is not None or self.leave_after_s is not None

    @property
    def counted(self) -> bool:
        """It becomes a request that the gateway counts."""
        return self.kind != "half"

    def bytes(self, request_id: str) -> bytes:
        """What goes over the wire."""
        if self.raw is not None:
            return self.raw
        head = (
            f"POST {self.path} HTTP/1.1\r\nhost: soak\r\ncontent-type: application/json\r\n"
            f"x-request-id: {request_id}\r\ncontent-length: {len(self.body)}\r\n\r\n"
        )
        return head.encode() + (self.body[: len(self.body) // 2] if self.kind == "half" else self.body)

    def texts(self) -> list[str]:
        """The complete text of each choice, as every engine generates it."""
        ask = openai.chat(self.body) if self.path == CHAT else openai.completions(self.body)
        [prompt] = ask.prompts
        seed = xxh64_intdigest(b"", xxh64_intdigest(b""))
        chain = tokens.block_hashes(prompt, BLOCK_TOKENS, seed)
        rest = prompt[len(chain) * BLOCK_TOKENS * tokens.TOKEN_BYTES :]
        start = xxh64_intdigest(rest, chain[-1] if chain else seed)
        return [tokens.output(start + i, 0, self.max_tokens).decode() for i in range(self.choices)]


def asks(rng: random.Random) -> Iterator[Ask]:
    """Requests without end. 82% want an answer, 8% leave early, 3% read slowly, 7% are broken."""
    groups = [_text(rng, GROUP_BYTES) for _ in range(GROUPS)]
    shares = [1 / (i + 1) for i in range(GROUPS)]
    makers = {_normal: 82, _leaving: 8, _slow: 3, _broken: 7}
    while True:
        [group] = rng.choices(groups, shares)
        start = group if rng.random() < 0.85 else _text(rng, rng.randint(100, GROUP_BYTES))
        [maker] = rng.choices(list(makers), list(makers.values()))
        yield maker(rng, start + _text(rng, rng.randint(40, 1200)))


def _text(rng: random.Random, length: int) -> str:
    return " ".join(rng.choices(_WORDS, k=length // 6)) + f" {rng.getrandbits(64):x}"


def _ask(rng: random.Random, prompt: str, max_tokens: int, *, stream: bool, n: int = 1) -> dict[str, object]:
    tree: dict[str, object] = {"model": MODEL, "max_tokens": max_tokens, "stream": stream}
    if n > 1:
        tree["n"] = n
    if stream:
        tree["stream_options"] = {"include_usage": True}
    if rng.random() < 0.6:
        return {**tree, "messages": [{"role": "user", "content": prompt}]}
    return {**tree, "prompt": prompt}


def _wire(tree: dict[str, object]) -> tuple[str, bytes]:
    return (CHAT if "messages" in tree else COMPLETIONS), msgspec.json.encode(tree)


def _normal(rng: random.Random, prompt: str) -> Ask:
    stream = rng.random() < 0.7
    max_tokens = rng.choice((1, 8, 32, 32, 64, 128) if stream else (1, 8, 32))
    path, body = _wire(_ask(rng, prompt, max_tokens, stream=stream))
    kind = "stream" if stream else "plain"
    return Ask(kind, path, body, stream, max_tokens, new_connection=rng.random() < 0.1)


def _leaving(rng: random.Random, prompt: str) -> Ask:
    stream = rng.random() < 0.7
    path, body = _wire(_ask(rng, prompt, 256, stream=stream))
    if stream and rng.random() < 0.8:
        return Ask("leave", path, body, stream, 256, leave_after_chunks=rng.randint(1, 60))
    return Ask("leave", path, body, stream, 256, leave_after_s=rng.uniform(0.05, 1.0))


def _slow(rng: random.Random, prompt: str) -> Ask:
    """More than the buffers on the way hold, so that the router has to wait for the client."""
    path, body = _wire(_ask(rng, prompt, 256, stream=True, n=8))
    return Ask("slow", path, body, True, 256, choices=8, slow=True, new_connection=True)


def _broken(rng: random.Random, prompt: str) -> Ask:
    tree = _ask(rng, prompt, 8, stream=False)
    path, body = _wire(tree)
    kind = rng.choice(("json", "model", "path", "http", "value", "half"))
    match kind:
        case "json":
            return Ask(kind, path, body[:-20], status=400, ending="refused")
        case "model":
            unknown = msgspec.json.encode({**tree, "model": "none"})
            return Ask(kind, path, unknown, status=404, ending="refused")
        case "path":
            return Ask(kind, "/sleep", b"{}", status=404, ending="refused")
        case "http":
            raw = b"POST / HTTP/1.1\r\nbad header\r\n\r\n"
            return Ask(kind, path, b"", raw=raw, status=400, ending="refused", new_connection=True)
        case "value":
            negative = msgspec.json.encode({**tree, "max_tokens": -5})
            return Ask(kind, path, negative, status=400, ending="error")
    return Ask(kind, path, body, leave_after_s=rng.uniform(0.0, 0.2), new_connection=True)
