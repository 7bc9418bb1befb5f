"""What holds for every format, found in the registry: a new one is tested before its own test exists."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pointsman import api
from pointsman.api import vllm_grpc
from pointsman.errors import BadRequest
from pointsman.prefix.hashing import block_ends, chains_of
from pointsman.types import InferenceRequest

FORMATS = (*api.formats(), api.PASSTHROUGH)
PATHS = [known.paths[0] if known.paths else "/v1/models" for known in FORMATS]

FIELDS = """
    model stream messages prompt input text input_ids token_ids max_tokens max_completion_tokens n cache_salt
    max_output_tokens sampling_params previous_response_id conversation instructions system image_url source
    content image_data query queries documents text_1 text_2 features reasoning input_file_id type url data
    output role tools
"""
names = st.sampled_from(FIELDS.split())
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
)
known_words = st.sampled_from(
    ["m", "http://h/a.png", "data:image/png;base64,iVBORw0KGgo=", "text", "base64", ""]
)
anything = st.recursive(
    scalars | known_words,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(names | st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=25,
)
objects = st.dictionaries(names, anything, max_size=10)
with_model = objects.map(lambda fields: fields | {"model": "m"})
header = st.dictionaries(
    st.sampled_from(
        ["content-type", "content-encoding", "x-llm-d-video-duration-seconds", "x-llm-d-video-resolution"]
    ),
    st.sampled_from(
        ["multipart/form-data; boundary=b", "application/json", "gzip", "", "10", "640x360", "-1x9"]
    ),
)


few = settings(max_examples=40, deadline=None)


def read(path, body, headers=None):
    """The request, or None for a ``BadRequest``; whatever else it raises is the test's failure."""
    try:
        request = api.find(path).parse("r1", path, headers or {}, body)
    except BadRequest:
        return None
    check(request, path, body)
    return request


def check(request: InferenceRequest, path, body):
    assert (request.id, request.path, request.body) == ("r1", path, body)
    assert isinstance(request.model, str)
    assert isinstance(request.stream, bool)
    assert isinstance(request.root, bytes)
    assert isinstance(request.state_id, str)
    assert request.max_tokens is None or 0 <= request.max_tokens <= 1 << 31
    assert 1 <= request.n <= 1 << 31
    assert request.prompt_tokens >= sum(prompt.tokens for prompt in request.prompts) >= 0
    for prompt in request.prompts:
        assert memoryview(prompt.data).readonly
    assert all(len(digest) == 16 and tokens >= 1 for digest, tokens in request.media)
    for chain in chains_of(request, block_ends(4, 1000)):  # its consumer takes what we give
        assert len(chain.rest(chain.length)) == 8 * chain.length


@pytest.mark.parametrize("path", PATHS)
@few
@given(body=st.binary(), headers=header)
def test_any_bytes(path, body, headers):
    read(path, body, headers)


@pytest.mark.parametrize("path", PATHS)
@few
@given(value=anything, headers=header)
def test_any_json(path, value, headers):
    read(path, json.dumps(value).encode(), headers)


@pytest.mark.parametrize("path", PATHS)
@few
@given(value=with_model, headers=header.filter(lambda headers: "content-encoding" not in headers))
def test_any_object_with_a_model_is_a_request(path, value, headers):
    """Whatever else is in it is the engine's to judge. Forms and gRPC are not JSON; calls on state have no
    model.
    """
    request = read(path, json.dumps(value).encode(), headers)
    if path.startswith(("/audio", "/images/edits")) or path in (vllm_grpc.GENERATE, vllm_grpc.EMBED):
        assert request is None
    else:
        assert request is not None
        assert request.model == (
            "" if request.format == "passthrough" or path == "/v1/conversations" else "m"
        )


@pytest.mark.parametrize("path", PATHS)
@few
@given(value=with_model, cut=st.integers(0, 400))
def test_a_body_cut_anywhere(path, value, cut):
    read(path, json.dumps(value).encode()[:cut])


@pytest.mark.parametrize("path", PATHS)
@few
@given(
    value=with_model,
    style=st.sampled_from([{"indent": 1}, {"separators": (",", ":")}, {"ensure_ascii": False}]),
)
def test_how_json_is_written_does_not_change_what_is_read(path, value, style):
    plain, styled = (read(path, json.dumps(value, **form).encode("utf-8", "replace")) for form in ({}, style))
    if plain is not None and styled is not None:
        assert (plain.model, plain.stream, plain.max_tokens, plain.n) == (
            styled.model,
            styled.stream,
            styled.max_tokens,
            styled.n,
        )
        assert len(plain.prompts) == len(styled.prompts)
        assert len(plain.media) == len(styled.media)


@pytest.mark.parametrize("path", PATHS)
def test_compressed_bodies_pass_through(path):
    request = read(
        path, b"\x1f\x8b", {"content-encoding": "gzip", "content-type": "multipart/form-data; boundary=b"}
    )
    assert request is not None
    assert (request.model, request.prompts) == ("", ())


def test_every_registered_format_is_covered():
    assert len(PATHS) == len(set(PATHS)) > 10
    assert all(api.find(path) is known for path, known in zip(PATHS, FORMATS, strict=True))


def test_the_reference_page_names_every_path():
    reference_page = (Path(__file__).parents[2] / "docs/reference/api.md").read_text()
    for known in api.formats():
        for path in known.paths:
            assert f"`{path}`" in reference_page
