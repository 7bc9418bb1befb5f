"""What a case says of the picker, in one line each."""

from __future__ import annotations

from typing import NoReturn


class Failed(Exception):
    """The picker does not do what the case requires; the message says in a line what it did."""


class Skipped(Exception):
    """The case cannot be tried here; the message says why."""


def fail(message: str) -> NoReturn:
    raise Failed(message)


def check(true: bool, message: str) -> None:
    """``Failed`` with ``message`` unless it is true."""
    if not true:
        raise Failed(message)


def equal(what: str, found: object, wanted: object) -> None:
    """``Failed`` unless ``found`` is ``wanted``; both are shown, shortened."""
    if found != wanted:
        raise Failed(f"{what} is {_short(found)}, not {_short(wanted)}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:80]}... ({len(text)} characters)"
