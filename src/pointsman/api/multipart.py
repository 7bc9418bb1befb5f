"""Forms with a file in them (audio to text, image edits): the fields beside the file, which is stepped
over.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from pointsman.api.body import compressed
from pointsman.api.format import Format, passthrough, register
from pointsman.errors import BadRequest
from pointsman.types import InferenceRequest

_BOUNDARY = re.compile(
    r'multipart/form-data\s*;(?:.*;)?\s*boundary=(?:"([^"]{1,200})"|([^\s;"]{1,200}))', re.I
)
_NAME = re.compile(rb'[;\s]name="?([^";\r\n]*)"?', re.I)
_WANTED = (b"model", b"stream")
_LONGEST = 1024
"""Bytes of a field's value; a model's name is shorter."""


def _form(request_id: str, path: str, headers: Mapping[str, str], body: bytes) -> InferenceRequest:
    if compressed(headers):
        return passthrough(request_id, path, headers, body)
    found = _BOUNDARY.match(headers.get("content-type", ""))
    if not found:
        raise BadRequest("Expected multipart/form-data with a boundary", param="content-type")
    fields = form_fields(body, (found[1] or found[2]).encode("latin-1", "replace"))
    model = fields.get(b"model", b"").decode(errors="replace").strip()
    if not model:
        raise BadRequest("`model` is missing: expected a form field with the name of a model", param="model")
    return InferenceRequest(
        id=request_id,
        path=path,
        format="openai",
        body=body,
        model=model,
        stream=fields.get(b"stream", b"").strip().lower() in (b"true", b"1"),
        headers=headers,
    )


def form_fields(body: bytes, boundary: bytes) -> dict[bytes, bytes]:
    """The short fields among ``_WANTED``. A form that breaks off ends there: the engine will complain of
    it.
    """
    fields: dict[bytes, bytes] = {}
    delimiter = b"--" + boundary
    start = body.find(delimiter)
    while start >= 0 and len(fields) < len(_WANTED):
        head = start + len(delimiter)
        value = body.find(b"\r\n\r\n", head)
        if value < 0 or body.startswith(b"--", head):
            break
        start = body.find(b"\r\n" + delimiter, value + 2)
        name = _name(body[head:value])
        if name in _WANTED:
            fields[name] = body[value + 4 : start if start >= 0 else len(body)][:_LONGEST]
        start += 2 if start >= 0 else 0
    return fields


def _name(head: bytes) -> bytes:
    """The field's name out of the headers of its part."""
    for line in head.split(b"\r\n"):
        if line[:20].lower() == b"content-disposition:" and (found := _NAME.search(line)):
            return found[1]
    return b""


register(
    Format(
        "openai",
        ("/audio/transcriptions", "/audio/translations", "/images/edits", "/images/variations"),
        _form,
    )
)
