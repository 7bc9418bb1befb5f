"""Judging a request: what the client saw against what a good answer is."""

from __future__ import annotations

import msgspec
import pytest
from bench.soak.asks import CHAT, COMPLETIONS, MODEL, Ask
from bench.soak.chaos import Event, Record
from bench.soak.client import Reply
from bench.soak.gateway import Trace
from bench.soak.verdict import Verdict, ending, judge

BAD, WELL = Trace(["bad", "bad", "bad"]), Trace(["well", "bad", "bad"])
ERROR = b'data: {"error":{"message":"broke off"}}\n\n'
REFUSAL = b'{"error":{"type":"SimulatedFault"}}'


def ask(path: str = COMPLETIONS, *, stream: bool = True) -> Ask:
    tree = {"model": MODEL, "prompt": "Hello", "messages": [{"role": "user", "content": "Hello"}]}
    return Ask("stream" if stream else "plain", path, msgspec.json.encode(tree), stream, 4)


def events(asked: Ask, tokens: int, *, done: bool = True) -> bytes:
    """The first ``tokens`` tokens of the answer, as a stream."""
    text = asked.texts()[0]
    pieces = [text[at : at + 4] for at in range(0, tokens * 4, 4)]
    field = (lambda p: {"delta": {"content": p}}) if asked.path == CHAT else (lambda p: {"text": p})
    bodies = [msgspec.json.encode({"choices": [{"index": 0, **field(piece)}]}) for piece in pieces]
    return b"".join(b"data: %b\n\n" % body for body in (*bodies, *([b"[DONE]"] if done else [])))


def reply(body: bytes, status: int = 200, end: str = "complete") -> Reply:
    return Reply(10.0, 11.0, status, body, end)


def record() -> Record:
    record = Record()
    record.add("bad", Event(0.0, 0, "crash", {"for_s": 5.0}), 9.0, 9.0)
    return record


def verdict(asked: Ask, seen: Reply, trace: Trace = BAD) -> Verdict:
    return judge(asked, seen, trace, record()).verdict


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_whole_stream_is_an_answer(path: str) -> None:
    asked = ask(path)
    assert verdict(asked, reply(events(asked, 4))) is Verdict.OK


def test_a_stream_that_ends_well_but_early_is_silent_truncation_even_where_an_engine_was_bad() -> None:
    asked = ask()
    assert verdict(asked, reply(events(asked, 3))) is Verdict.SILENT
    assert verdict(asked, reply(events(asked, 4, done=False))) is Verdict.SILENT


def test_bytes_of_another_answer_are_never_excused() -> None:
    asked = ask()
    foreign = events(asked, 4).replace(b'"text":"', b'"text":"?')
    assert verdict(asked, reply(foreign)) is Verdict.SILENT
    assert verdict(asked, reply(foreign, end="cut")) is Verdict.SILENT
    assert verdict(asked, reply(b"data: {not json}\n\n")) is Verdict.SILENT


@pytest.mark.parametrize(("trace", "due"), [(BAD, Verdict.CUT), (Trace(["well"]), Verdict.CUT_NO_CAUSE)])
def test_a_visible_cut_needs_a_fault_at_the_engine(trace: Trace, due: Verdict) -> None:
    asked = ask()
    part = events(asked, 2, done=False)
    assert verdict(asked, reply(part + ERROR), trace) is due
    assert verdict(asked, reply(part + b"data: {half", end="cut"), trace) is due
    assert verdict(ask(stream=False), reply(b'{"choi', end="cut"), trace) is due


def test_the_endpoint_named_in_the_answer_is_believed_before_the_trace() -> None:
    asked = ask()
    seen = reply(events(asked, 2, done=False) + ERROR)
    seen.headers[b"x-pointsman-endpoint"] = b"well"
    assert verdict(asked, seen) is Verdict.CUT_NO_CAUSE


@pytest.mark.parametrize(
    ("status", "trace", "due"),
    [
        (503, BAD, Verdict.UNLUCKY),
        (504, BAD, Verdict.UNLUCKY),
        (503, WELL, Verdict.LOST),
        (502, Trace(["bad", "bad"]), Verdict.LOST),
        (503, Trace(), Verdict.LOST),
        (500, Trace(["bad"]), Verdict.PASSED_ON),
        (500, Trace(["well"]), Verdict.LOST),
        (404, BAD, Verdict.WRONG),
    ],
)
def test_an_error_is_excused_when_every_try_met_a_bad_engine(status: int, trace: Trace, due: Verdict) -> None:
    assert verdict(ask(), reply(REFUSAL, status), trace) is due


def test_no_answer_at_all_is_a_loss() -> None:
    assert verdict(ask(), reply(b"", 0, "cut")) is Verdict.LOST
    assert verdict(ask(), reply(b"", 0, "never")) is Verdict.NEVER


def test_a_broken_request_must_be_refused() -> None:
    broken = Ask("json", CHAT, b"{", status=400, ending="refused")
    assert verdict(broken, reply(b"{}", 400)) is Verdict.OK
    assert verdict(broken, reply(b"{}", 200)) is Verdict.WRONG


def test_the_ending_that_the_gateway_must_have_counted() -> None:
    asked = ask()
    cases = {
        "ok": reply(events(asked, 4)),
        "failed": reply(events(asked, 2, done=False) + ERROR),
        "error": reply(REFUSAL, 503),
        "": reply(b"", 200, "left"),
    }
    assert {due: ending(asked, seen) for due, seen in cases.items()} == {due: due for due in cases}
    assert ending(asked, reply(b'{"error":{"type":"server_error"}}', 502)) == "failed"
    assert ending(asked, reply(b"", 200, "cut")) == "failed"
