"""What became of one request, and whether that may be: by what the client saw and the faults' record."""

from dataclasses import dataclass
from enum import Enum
from typing import Any

import msgspec

from .asks import Ask
from .chaos import Record
from .client import Reply
from .gateway import Trace

TRIES = 3
"""The router's default: endpoints one request may be sent to."""
ENGINES_OWN = b"SimulatedFault"


class Verdict(Enum):
    """The first group is fine, the second the faults' doing, the third must not happen."""

    OK = "answered"
    LEFT = "left by the client"
    CUT = "cut visibly, its engine failed mid-answer"
    PASSED_ON = "engine's own 500 passed on"
    UNLUCKY = "met bad engines in every try"
    LOST = "lost though it could have been answered"
    CUT_NO_CAUSE = "cut without a fault at its engine"
    SILENT = "ended well but was not complete or not correct"
    NEVER = "never ended"
    WRONG = "answered with another status than due"

    @property
    def fine(self) -> bool:
        return self in _FINE


_FINE = frozenset({Verdict.OK, Verdict.LEFT, Verdict.CUT, Verdict.PASSED_ON, Verdict.UNLUCKY})


@dataclass(frozen=True)
class Judged:
    verdict: Verdict
    why: str = ""


class _Choice(msgspec.Struct):
    index: int = 0
    text: str | None = None
    delta: dict[str, Any] = {}
    message: dict[str, Any] = {}

    def content(self) -> str:
        return self.text or self.delta.get("content") or self.message.get("content") or ""


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    error: Any = None


@dataclass
class Content:
    """The texts in a body. ``error``: a stream said that it broke off; ``done``: it said that it is over."""

    texts: list[str]
    error: bool = False
    done: bool = False


def content(ask: Ask, body: bytes) -> Content:
    """``body`` read as the answer to ``ask``; ``msgspec.DecodeError`` when it cannot be."""
    found = Content([""] * ask.choices)
    parts: list[list[str]] = [[] for _ in range(ask.choices)]
    for data in _datas(body) if ask.stream else [body]:
        if data == b"[DONE]":
            found.done = True
            continue
        event = msgspec.json.decode(data, type=_Event)
        found.error |= event.error is not None
        for choice in event.choices:
            parts[choice.index].append(choice.content())
    found.texts = ["".join(part) for part in parts]
    return found


def _datas(body: bytes) -> list[bytes]:
    return [event[6:] for event in body.split(b"\n\n") if event.startswith(b"data: ")]


def judge(ask: Ask, reply: Reply, trace: Trace, record: Record) -> Judged:
    """``trace``: only asked for when it was not simply answered."""
    if reply.end == "never":
        return Judged(Verdict.NEVER, f"status {reply.status}, {len(reply.body)} bytes")
    if reply.end == "left":
        return Judged(Verdict.LEFT)
    if reply.status == 200:
        return _with_body(ask, reply, trace, record)
    if not reply.status and trace.begun:
        return _cut(reply, trace, record, f"before the client had read anything: {reply.error}")
    if reply.end == "cut":
        return Judged(Verdict.LOST, f"the connection ended without an answer: {reply.error} {trace}")
    if reply.status == ask.status:
        return Judged(Verdict.OK)
    return _refused(reply, trace.tried, record)


def _refused(reply: Reply, tried: list[str], record: Record) -> Judged:
    why = f"{reply.status} {reply.body[:200]!r} tried {tried}"
    if reply.status < 500 and reply.status != 429:
        return Judged(Verdict.WRONG, why)
    if not record.blamed(tried, reply.sent_s, reply.ended_s):
        return Judged(Verdict.LOST, why)
    if reply.status == 500 and ENGINES_OWN in reply.body:
        return Judged(Verdict.PASSED_ON)
    if len(tried) < TRIES:
        return Judged(Verdict.LOST, f"only {len(tried)} tries: {why}")
    return Judged(Verdict.UNLUCKY, why)


def _with_body(ask: Ask, reply: Reply, trace: Trace, record: Record) -> Judged:
    if ask.status != 200:
        return Judged(Verdict.WRONG, f"200 where {ask.status} was due")
    if not ask.stream and reply.end == "cut":
        return _cut(reply, trace, record, "in the middle of a body")
    whole = reply.body if reply.end == "complete" else reply.body[: reply.body.rfind(b"\n\n") + 2]
    try:
        found = content(ask, whole)
    except (msgspec.DecodeError, IndexError) as exc:
        return Judged(Verdict.SILENT, f"not readable: {exc}: {reply.body[-200:]!r}")
    wanted = ask.texts()
    if not all(want.startswith(got) for want, got in zip(wanted, found.texts, strict=True)):
        return Judged(Verdict.SILENT, "another text than this prompt's")
    if reply.end == "cut" or found.error:
        return _cut(reply, trace, record, "an error event" if found.error else "in the middle of a stream")
    if found.texts != wanted or (ask.stream and not found.done):
        got = sum(map(len, found.texts))
        return Judged(Verdict.SILENT, f"{got} of {sum(map(len, wanted))} characters, [DONE]: {found.done}")
    return Judged(Verdict.OK)


def _cut(reply: Reply, trace: Trace, record: Record, how: str) -> Judged:
    named = reply.headers.get(b"x-pointsman-endpoint", b"").decode()
    served_by = [named] if named else trace.tried[-1:]
    took_s = reply.ended_s - reply.sent_s
    why = f"{how} by {served_by} after {took_s:.2f} s, {len(reply.body)} bytes"
    if record.blamed(served_by, reply.sent_s, reply.ended_s):
        return Judged(Verdict.CUT, why)
    return Judged(Verdict.CUT_NO_CAUSE, why)


def ending(ask: Ask, reply: Reply) -> str:
    """Under which ending the gateway must have counted it; "" when the client left, which may be any."""
    if reply.end == "left":
        return ""
    if reply.end != "complete" or not reply.status:
        return "failed"
    if reply.status == 200:
        return "failed" if b'data: {"error"' in reply.body[-2000:] else "ok"
    if reply.status == ask.status:
        return ask.ending
    return "error" if ENGINES_OWN in reply.body else "failed"
