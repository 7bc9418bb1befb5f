"""What a plugin notes of a request when it is sent, until it ends."""

from __future__ import annotations

from typing import Generic, TypeVar

from pointsman.types import InferenceRequest

T = TypeVar("T")


class UnderWay(Generic[T]):
    """Notes by request. A request that is sent again, elsewhere, replaces its note; each one's end takes it
    out, so nothing stays behind."""

    __slots__ = ("_notes",)

    def __init__(self) -> None:
        # By identity, since clients may give two requests one id; the request is kept with its note, since
        # the identity of one that is gone is free to be another's.
        self._notes: dict[int, tuple[InferenceRequest, T]] = {}

    def __len__(self) -> int:
        return len(self._notes)

    def note(self, request: InferenceRequest, note: T) -> None:
        self._notes[id(request)] = (request, note)

    def take(self, request: InferenceRequest) -> T | None:
        """The note of its last try, which is forgotten."""
        found = self._notes.pop(id(request), None)
        return found[1] if found else None
