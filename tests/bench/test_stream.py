"""Reading a streamed answer, however its bytes are split."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman.bench.stream import Gaps, Reading
from pointsman.types import Usage


def _data(payload):
    return b"data: " + (payload if isinstance(payload, bytes) else json.dumps(payload).encode()) + b"\n\n"


def _token(text="x"):
    return _data({"choices": [{"index": 0, "text": text}], "usage": None})


USAGE = _data(
    {
        "choices": [],
        "usage": {
            "prompt_tokens": 100,
            "completion_tokens": 3,
            "prompt_tokens_details": {"cached_tokens": 64},
        },
    }
)
DONE = b"data: [DONE]\n\n"
ANSWER = (
    b": hello\n\n"
    + _token("")
    + _token('a "choices":[] \n\ndata: ')
    + b"event: x\n"
    + _token()
    + USAGE
    + DONE
)


def _read(pieces):
    reading = Reading(Gaps())
    for at, piece in enumerate(pieces):
        reading.feed(piece, float(at + 1))
    return reading, *reading.finish()


def test_counts_token_events_and_takes_the_usage():
    reading, usage, error = _read([ANSWER])
    assert (reading.events, reading.done, usage, error) == (3, True, Usage(100, 3, 64), None)


@given(cuts=st.lists(st.integers(0, len(ANSWER)), max_size=12), crlf=st.booleans())
def test_splitting_the_bytes_anywhere_changes_nothing(cuts, crlf):
    answer = ANSWER.replace(b"\n", b"\r\n") if crlf else ANSWER
    edges = [0, *sorted(cuts), len(answer)]
    pieces = [answer[a:b] for a, b in itertools.pairwise(edges)]
    reading, usage, error = _read(pieces)
    assert (reading.events, reading.done, usage, error) == (3, True, Usage(100, 3, 64), None)


def test_first_and_last_are_the_arrivals_of_tokens_alone():
    role = _data({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
    word = _data({"choices": [{"delta": {"content": "a"}}]})
    reading, _, _ = _read([b": comment\n\n", role, word, word, USAGE, DONE])
    assert (reading.first_s, reading.last_s, reading.events) == (3.0, 4.0, 2)


@pytest.mark.parametrize("key", ["content", "reasoning_content", "tool_calls"])
def test_a_first_event_with_the_role_and_something_to_say_counts(key):
    reading, _, _ = _read([_data({"choices": [{"delta": {"role": "assistant", key: ["x"]}}]})])
    assert reading.events == 1


def test_gaps_are_between_token_events():
    gaps = Gaps()
    reading = Reading(gaps)
    for at in (1.0, 1.25, 1.75):
        reading.feed(_token(), at)
    reading.feed(USAGE + DONE, 9.0)
    assert sum(gaps.counts.values()) == 2
    assert [pytest.approx(us / 1e6, rel=1e-3) for us in sorted(gaps.counts)] == [0.25, 0.5]


def test_an_error_event_ends_the_stream_as_an_error():
    reading, _, error = _read([_token(), _data({"error": {"message": "engine died"}})])
    assert "engine died" in error
    assert not reading.done


def test_usage_in_the_last_token_event_is_taken():
    last = _data({"choices": [{"text": "x"}], "usage": {"prompt_tokens": 5, "completion_tokens": 2}})
    reading, usage, _ = _read([_token(), last, DONE])
    assert (reading.events, usage) == (2, Usage(5, 2, None))


def test_a_body_that_is_no_stream_has_no_tokens():
    reading, usage, error = _read([b'{"choices": [{"text": "all at once"}]}'])
    assert (reading.events, reading.done, usage, error) == (0, False, Usage(), None)
