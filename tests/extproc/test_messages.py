"""What the quick way of reading and writing bodies says is what the protobuf classes say."""

from __future__ import annotations

import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb
from hypothesis import example, given
from hypothesis import strategies as st

from pointsman.extproc import messages
from pointsman.extproc.messages import REQUEST_BODY, RESPONSE_BODY, Body

EDGES = [*range(1, 5), *range(115, 140), *range(16_370, 16_400), 61_999, 62_000]
"""Around the lengths where length prefixes grow."""


def asked(data: bytes, end: bool, of_request: bool = True) -> pb.ProcessingRequest:
    body = pb.HttpBody(body=data, end_of_stream=end)
    return pb.ProcessingRequest(**{"request_body" if of_request else "response_body": body})


@given(st.binary(max_size=300), st.booleans(), st.booleans())
@example(b"", True, True)
@example(b"", False, True)
@example(b"\x10\x01", False, True)
@example(b"ends as if it were the last\x10\x01", False, False)
@example(b"ends as if there was no metadata\x42\x00", True, False)
@example(b"\x10\x01\x42\x00", False, False)
def test_a_body_is_read_as_the_classes_wrote_it(data: bytes, end: bool, of_request: bool) -> None:
    message = asked(data, end, of_request)
    body = (REQUEST_BODY if of_request else RESPONSE_BODY, Body(data, end))
    assert messages.read(message.SerializeToString()) == body
    message.metadata_context.SetInParent()  # as Envoy writes it
    assert messages.read(message.SerializeToString()) == body


@pytest.mark.parametrize("end", [False, True])
def test_bodies_of_all_lengths_are_read_and_written(end: bool) -> None:
    for size in EDGES:
        data = b"x" * size
        assert messages.read(asked(data, end).SerializeToString()) == (REQUEST_BODY, Body(data, end))
        (answer,) = messages.chunks(True, data, end)
        piece = pb.ProcessingResponse.FromString(answer).request_body.response.body_mutation.streamed_response
        assert (piece.body, piece.end_of_stream) == (data, end)


def test_a_body_that_comes_with_metadata_is_read_as_well() -> None:
    message = asked(b"hello", True)
    message.metadata_context.filter_metadata["envoy.lb"].update({"a": "b"})
    assert messages.read(message.SerializeToString()) == (REQUEST_BODY, Body(b"hello", True))


@given(st.binary(max_size=60))
def test_nothing_but_malformed_is_raised(data: bytes) -> None:
    try:
        messages.read(data)
        messages.read(b"\x22" + data)
    except messages.Malformed:
        return
