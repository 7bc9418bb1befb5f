"""vLLM's gRPC API (service vllm.grpc.engine.VllmEngine): generation and embeddings from token ids or text.

Field numbers: vllm_engine.proto as in smg-grpc-proto 0.4.28. No message names a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Final

import msgspec

from pointsman.api.body import compressed
from pointsman.api.format import Format, passthrough, register
from pointsman.api.prompts import prompt
from pointsman.api.protobuf import Malformed, count, fields, unpacked
from pointsman.errors import BadRequest
from pointsman.types import InferenceRequest, Prompt, Tokenized, Usage

SERVICE: Final = "/vllm.grpc.engine.VllmEngine/"
GENERATE: Final = SERVICE + "Generate"
EMBED: Final = SERVICE + "Embed"
HEAD_BYTES: Final = 5
"""Of each message in a gRPC body: whether it is compressed, and its length."""
MAX_MESSAGE_BYTES: Final = 4 * 1024 * 1024
"""gRPC's own default; larger messages of a response are not looked into."""
_MOST: Final = 1 << 31
"""As ``body.Count``: larger numbers count as not given."""


class Input(msgspec.Struct, gc=False):
    """What of GenerateRequest (field 2 tokenized, 3 text, 4 sampling_params, 5 stream, 7 and 11 mm_inputs,
    10 media_refs) and EmbedRequest (2) matters.
    """

    ids: bytes = b""
    """TokenizedInput.input_ids (2), packed as they came."""
    text: memoryview = memoryview(b"")
    max_tokens: int | None = None
    n: int = 1
    stream: bool = False
    media: list[memoryview] = []
    """MultimodalInputs."""
    references: bytes = b""
    """MediaRefs: media that the engine fetches; the ids do not have their tokens yet."""


def _read(body: bytes) -> Input | None:
    """The request's message; None where it is compressed."""
    length = int.from_bytes(body[1:HEAD_BYTES], "big")
    if len(body) < HEAD_BYTES + length:
        raise Malformed(f"{length + HEAD_BYTES} bytes are told and {len(body)} have come")
    if body[0]:
        return None
    found = Input()
    for number, value, data in fields(memoryview(body)[HEAD_BYTES : HEAD_BYTES + length]):
        if number == 2:
            found.ids, found.text = b"".join(_all(data, 2)), memoryview(b"")
        elif number == 3:
            found.ids, found.text = b"", data
        elif number == 4:
            sampling = {n: v for n, v, _ in fields(data)}
            found.max_tokens = _count(sampling.get(8))
            found.n = _count(sampling.get(15)) or 1
        elif number == 5:
            found.stream = value != 0
        elif number in (7, 11):
            found.media = [*found.media, data]
        elif number == 10:
            found.references = bytes(data)
    return found


def _all(data: memoryview, wanted: int) -> Iterator[memoryview]:
    return (part for number, _, part in fields(data) if number == wanted)


def _count(value: int | None) -> int | None:
    return value if value is not None and value <= _MOST else None


def _parse(request_id: str, path: str, headers: Mapping[str, str], body: bytes) -> InferenceRequest:
    try:
        found = None if compressed(headers) else _read(body)
        if found is None:
            return passthrough(request_id, path, headers, body)
        root = b"\0".join(h for media in found.media for h in _all(media, 6)) + found.references
    except Malformed as exc:
        raise BadRequest(f"Invalid gRPC message: {exc}") from exc
    # Longer lists of ids begin with the bytes of the shorter ones, as texts do.
    one = Prompt(found.ids, count(found.ids)) if found.ids else prompt(found.text)
    return InferenceRequest(
        id=request_id,
        path=path,
        format="vllmgrpc",
        body=body,
        stream=found.stream,
        prompts=(one,) if one.size else (),
        root=root,
        prompt_tokens=one.tokens,
        max_tokens=found.max_tokens,
        n=found.n,
        headers=headers,
    )


# -- for whoever needs token ids


def tokenized(body: bytes) -> Tokenized | str | None:
    """The prompt as token ids, or as text; None where neither tells what the engine computes."""
    try:
        found = _read(body)
        if found is None or found.references:
            return None
        if not found.ids:
            return str(found.text, "utf-8", "replace")
        placed = [item for media in found.media for item in _placed(media)]
        return Tokenized(unpacked(found.ids), tuple(sorted(placed, key=lambda item: item[1])))
    except (Malformed, ValueError):
        return None


def _placed(media: memoryview) -> Iterator[tuple[str, int, int]]:
    """MultimodalInputs: mm_hashes (6) and mm_placeholders (5: offset 1, length 2); ``ValueError`` where one
    has no other.
    """
    for name, place in zip(_all(media, 6), _all(media, 5), strict=True):
        at = {n: v for n, v, _ in fields(place)}
        yield str(name, "utf-8"), at.get(1, 0), at.get(2, 0)


# -- what comes back


class Responses:
    """Token counts out of a response as it comes (``format.Counting``): each message is read when whole."""

    def __init__(self, read: Callable[[Responses, memoryview], None]) -> None:
        self._read = read
        self._held = bytearray()
        self._skipped = 0
        """Bytes to come of a message that is too large to hold."""
        self.prompt = 0
        self.cached: int | None = None
        self.streamed: dict[int, int] = {}
        """Output tokens in chunks, by choice; ``completed``: as the last message of it says."""
        self.completed: dict[int, int] = {}

    def feed(self, data: bytes) -> None:
        held = self._held
        held += data
        while True:
            if self._skipped:
                gone = min(self._skipped, len(held))
                self._skipped -= gone
                del held[:gone]
            end = HEAD_BYTES + int.from_bytes(held[1:HEAD_BYTES], "big")
            if len(held) < HEAD_BYTES:
                return
            if end > MAX_MESSAGE_BYTES:
                self._skipped = end
                continue
            if len(held) < end:
                return
            if not held[0]:
                self._message(bytes(held[HEAD_BYTES:end]))
            del held[:end]

    def _message(self, message: bytes) -> None:
        try:
            self._read(self, memoryview(message))
        except Malformed:
            return  # the client's to find out

    def usage(self) -> Usage:
        """As far as it has come."""
        choices = self.streamed.keys() | self.completed.keys()
        output = sum(max(self.streamed.get(i, 0), self.completed.get(i, 0)) for i in choices)
        return Usage(self.prompt or None, output if choices else None, self.cached)


def _generated(so_far: Responses, message: memoryview) -> None:
    """GenerateResponse: a chunk (1) or what completes a choice (2). In a stream vLLM's last message may count
    the whole choice or what is new in it, so tokens are counted in chunks as well.
    """
    for number, _, part in fields(message):
        if number not in (1, 2):
            continue
        said, tokens = dict[int, int](), 0
        for n, value, data in fields(part):
            if n == 1:
                tokens += count(bytes(data))
            else:
                said[n] = value
        # GenerateStreamChunk: token_ids 1, prompt_tokens 2, completion_tokens 3, cached_tokens 4, index 7.
        # GenerateComplete: output_ids 1, prompt_tokens 3, completion_tokens 4, cached_tokens 5, index 8.
        shift = number - 1
        so_far.prompt = said.get(2 + shift, 0) or so_far.prompt
        so_far.cached = max(so_far.cached or 0, said.get(4 + shift, 0))
        choice = said.get(7 + shift, 0)
        if number == 1:
            so_far.streamed[choice] = so_far.streamed.get(choice, 0) + tokens
        else:
            so_far.completed[choice] = max(tokens, said.get(3 + shift, 0))


def _embedded(so_far: Responses, message: memoryview) -> None:
    """EmbedResponse: prompt_tokens (2)."""
    so_far.prompt = next((value for number, value, _ in fields(message) if number == 2), 0)


def _unknown(tail: bytes) -> Usage:
    """The last bytes of a response do not tell where a message begins."""
    return Usage()


register(
    Format("vllmgrpc", (GENERATE,), _parse, usage=_unknown, counting=partial(Responses, _generated)),
    Format("vllmgrpc", (EMBED,), _parse, usage=_unknown, counting=partial(Responses, _embedded)),
    Format(
        "vllmgrpc",
        tuple(SERVICE + call for call in ("HealthCheck", "Abort", "GetModelInfo", "GetServerInfo")),
        passthrough,
        usage=_unknown,
    ),
)
