"""vLLM's gRPC messages as protobuf classes, as far as tests speak them, and their framing.

Names and numbers: vllm_engine.proto as in smg-grpc-proto 0.4.28.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import Message

PACKAGE = "vllm.grpc.engine"

_MESSAGES: Mapping[str, Mapping[str, tuple[int, str]]] = {
    "SamplingParams": {"temperature": (1, "float"), "max_tokens": (8, "uint32"), "n": (15, "uint32")},
    "TokenizedInput": {"original_text": (1, "string"), "input_ids": (2, "uint32*")},
    "PlaceholderRange": {"offset": (1, "uint32"), "length": (2, "uint32")},
    "MultimodalInputs": {"mm_placeholders": (5, "PlaceholderRange*"), "mm_hashes": (6, "string*")},
    "MediaRef": {"url": (2, "string")},
    "MediaRefs": {"items": (1, "MediaRef*")},
    "GenerateRequest": {
        "request_id": (1, "string"),
        "tokenized": (2, "TokenizedInput"),
        "text": (3, "string"),
        "sampling_params": (4, "SamplingParams"),
        "stream": (5, "bool"),
        "mm_inputs": (7, "MultimodalInputs"),
        "media_refs": (10, "MediaRefs"),
        "extra_mm_inputs": (11, "MultimodalInputs*"),
    },
    "GenerateStreamChunk": {
        "token_ids": (1, "uint32*"),
        "prompt_tokens": (2, "uint32"),
        "completion_tokens": (3, "uint32"),
        "cached_tokens": (4, "uint32"),
        "index": (7, "uint32"),
    },
    "GenerateComplete": {
        "output_ids": (1, "uint32*"),
        "finish_reason": (2, "string"),
        "prompt_tokens": (3, "uint32"),
        "completion_tokens": (4, "uint32"),
        "cached_tokens": (5, "uint32"),
        "index": (8, "uint32"),
    },
    "GenerateResponse": {"chunk": (1, "GenerateStreamChunk"), "complete": (2, "GenerateComplete")},
    "EmbedRequest": {"request_id": (1, "string"), "tokenized": (2, "TokenizedInput")},
    "EmbedResponse": {"embedding": (1, "float*"), "prompt_tokens": (2, "uint32")},
    "HealthCheckRequest": {},
    "HealthCheckResponse": {"healthy": (1, "bool"), "message": (2, "string")},
}


def _file() -> descriptor_pb2.FileDescriptorProto:
    field = descriptor_pb2.FieldDescriptorProto
    kinds = {"uint32": field.TYPE_UINT32, "string": field.TYPE_STRING, "bool": field.TYPE_BOOL}
    kinds["float"] = field.TYPE_FLOAT
    file = descriptor_pb2.FileDescriptorProto(name="vllm_engine.proto", package=PACKAGE, syntax="proto3")
    for name, members in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for member, (number, kind) in members.items():
            label = field.LABEL_REPEATED if kind.endswith("*") else field.LABEL_OPTIONAL
            added = message.field.add(name=member, number=number, label=label)
            kind = kind.removesuffix("*")
            added.type = kinds.get(kind, field.TYPE_MESSAGE)
            if kind not in kinds:
                added.type_name = f".{PACKAGE}.{kind}"
    return file


_pool = descriptor_pool.DescriptorPool()
_pool.Add(_file())
_classes = message_factory.GetMessageClassesForFiles(["vllm_engine.proto"], _pool)


def message(name: str, /, **values: Any) -> Message:
    """A message of this name; inner ones as dicts."""
    return _classes[f"{PACKAGE}.{name}"](**values)


def read(name: str, data: bytes) -> Any:
    """The message that ``data`` is."""
    return _classes[f"{PACKAGE}.{name}"].FromString(data)


def framed(*messages: Message) -> bytes:
    """As they stand in a gRPC body."""
    written = [m.SerializeToString() for m in messages]
    return b"".join(b"\0" + len(data).to_bytes(4, "big") + data for data in written)
