"""JSON bodies: the few fields that matter are decoded, everything else is stepped over.

A format describes those fields as a struct. Big ones are ``Raw``: msgspec walks over them and hands back
the bytes where they lie, so a 32 KB prompt is neither built nor copied. We complain only of what we cannot
route: broken JSON, a body that is no object, a ``model`` that is no string. Any other field of the wrong
type is left for the engine to refuse and counts as not given here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar, get_type_hints

import msgspec
from msgspec import Raw

from pointsman.api.cutting import MARK, Cut, cut, uncut
from pointsman.api.format import Parse, passthrough
from pointsman.api.prompts import ABSENT
from pointsman.errors import BadRequest
from pointsman.types import InferenceRequest, Prompt, Tokenized

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]
"""A number of tokens or choices. Beyond this it is nonsense, and counts as not given."""


class Body(msgspec.Struct, gc=False):
    """What every format's body may hold."""

    model: str | None = None
    stream: bool | None = None


class Facts(msgspec.Struct, gc=False):
    """What a format read out of its body: the fields of ``InferenceRequest`` that are its business."""

    prompts: tuple[Prompt, ...] = ()
    prompt_tokens: int = 0
    root: bytes = b""
    max_tokens: int | None = None
    n: int = 1
    media: tuple[tuple[str, int], ...] = ()
    state_id: str = ""
    cache_salt: str = ""
    tokenized: tuple[Tokenized, ...] = ()
    ours: str = ""
    """A field that is meant for us and must not be forwarded."""


B = TypeVar("B", bound=Body)


def json_parser(
    name: str, shape: type[B], read: Callable[[B, Mapping[str, str]], Facts], *, needs_model: bool = True
) -> Parse:
    """A parser for bodies of ``shape``; ``read`` turns the fields (and headers) into facts."""
    fields_of = reader(shape)

    def parse(request_id: str, path: str, headers: Mapping[str, str], body: bytes) -> InferenceRequest:
        if compressed(headers):
            return passthrough(request_id, path, headers, body)
        try:
            fields = fields_of(body)
            facts = read(fields, headers)
        except RecursionError as exc:
            raise BadRequest("Invalid JSON: nested too deeply") from exc
        if needs_model and not fields.model:
            raise BadRequest("`model` is missing: expected the name of a model, a string", param="model")
        return InferenceRequest(
            id=request_id,
            path=path,
            format=name,
            body=_without(facts.ours, body) if facts.ours else body,
            model=fields.model or "",
            stream=fields.stream is True,
            prompts=facts.prompts,
            root=facts.root,
            tokenized=facts.tokenized,
            cache_salt=facts.cache_salt,
            prompt_tokens=facts.prompt_tokens,
            max_tokens=facts.max_tokens,
            n=facts.n,
            media=facts.media,
            state_id=facts.state_id,
            headers=headers,
        )

    return parse


_fields = msgspec.json.Decoder(dict[str, Raw]).decode


def _without(name: str, body: bytes) -> bytes:
    try:
        fields = _fields(body.removeprefix(_BOM))
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise _broken(body, exc) from exc
    del fields[name]
    return msgspec.json.encode(fields)


def compressed(headers: Mapping[str, str]) -> bool:
    """Whether the body is encoded; unpacking it would cost more than a better choice gains."""
    return headers.get("content-encoding", "identity") != "identity"


def reader(shape: type[B]) -> Callable[[bytes], B]:
    """A function from a body to its fields, which raises ``BadRequest`` where JSON or ``model`` is broken."""
    decode = msgspec.json.Decoder(shape).decode
    lenient = _lenient(shape)
    raw_fields = [name for name, hint in get_type_hints(shape).items() if hint is Raw]

    def read_cut(body: bytes, found: Cut) -> B | None:
        """The fields of a body from its skeleton; None when only the whole body can tell."""
        try:
            fields = decode(found[0])
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None
        for name in raw_fields:
            value = getattr(fields, name)
            if value is not ABSENT and MARK in (part := bytes(value)):
                setattr(fields, name, uncut(part, found, body))  # bytes serve as well as Raw
        if fields.model and _MARK in fields.model:
            return None
        return fields

    def read(body: bytes) -> B:
        found = cut(body)
        if found is not None:
            fields = read_cut(body, found)
            if fields is not None:
                return fields
        try:
            return decode(body)
        except msgspec.ValidationError:
            return lenient(body)
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            if body.startswith(_BOM) and not body.startswith(_BOM, len(_BOM)):
                return read(body[len(_BOM) :])
            raise _broken(body, exc) from exc

    return read


_MARK = MARK.decode()
_BOM = b"\xef\xbb\xbf"


def _lenient(shape: type[B]) -> Callable[[bytes], B]:
    """As ``shape``, field by field: ``"16"`` for 16 is understood, what fits no better is left out."""
    hints = get_type_hints(shape, include_extras=True)
    raw: Any = msgspec.defstruct(shape.__name__, [(name, Raw, ABSENT) for name in hints])
    decode = msgspec.json.Decoder(raw).decode

    def read(body: bytes) -> B:
        try:
            found = decode(body)
        except msgspec.ValidationError as exc:
            raise BadRequest(f"The body must be a JSON object: {exc}") from exc
        except msgspec.DecodeError as exc:
            raise _broken(body, exc) from exc
        fields: dict[str, Any] = {}
        for name, hint in hints.items():
            value = getattr(found, name)
            if value is ABSENT:
                continue
            try:
                fields[name] = value if hint is Raw else msgspec.json.decode(value, type=hint, strict=False)
            except (msgspec.DecodeError, UnicodeDecodeError) as exc:
                if name == "model":
                    raise BadRequest(f"`model` must be a string: {exc}", param="model") from exc
        return shape(**fields)

    return read


_AT = re.compile(r" \(byte (\d+)\)$")


def _broken(body: bytes, exc: Exception) -> BadRequest:
    """A ``BadRequest`` that names the place, as far as there is one."""
    why = str(exc).removeprefix("JSON is malformed: ")
    at = len(body)
    if isinstance(exc, UnicodeDecodeError):
        why, at = "not valid UTF-8", _first_invalid(body)
    elif found := _AT.search(why):
        why, at = why[: found.start()], int(found[1])
    elif not body:
        why = "the body is empty"
    else:
        why = "the text ends too early"
    line = body.count(b"\n", 0, at) + 1
    column = at - body.rfind(b"\n", 0, at)
    return BadRequest(f"Invalid JSON at byte {at} (line {line}, column {column}): {why}")


def _first_invalid(body: bytes) -> int:
    try:
        body.decode()
    except UnicodeDecodeError as exc:
        return exc.start
    return len(body)
