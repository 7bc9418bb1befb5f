"""What plugins learn from requests that have ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from pointsman.types import Endpoint

T = TypeVar("T")


class Learned(Generic[T]):
    """Something learned of each endpoint, kept by slot: an endpoint that takes the slot of one that left
    begins anew. So no more is kept than there were endpoints at once.
    """

    __slots__ = ("_by_slot", "_new")

    def __init__(self, new: Callable[[], T]) -> None:
        self._new = new
        self._by_slot: dict[int, tuple[str, T]] = {}

    def __len__(self) -> int:
        return len(self._by_slot)

    def get(self, endpoint: Endpoint) -> T | None:
        """What is known of it; None when that is nothing, or when it has left and another has its slot."""
        found = self._by_slot.get(endpoint.slot)
        return found[1] if found is not None and found[0] == endpoint.name else None

    def of(self, endpoint: Endpoint) -> T:
        """The same, new where nothing is known. For endpoints that are in the pool."""
        found = self.get(endpoint)
        if found is None:
            found = self._new()
            self._by_slot[endpoint.slot] = (endpoint.name, found)
        return found


class RunningMean:
    """A mean in which each new value counts ``share``, and those before it the rest. 0 before the first."""

    __slots__ = ("_share", "value")

    def __init__(self, share: float) -> None:
        self._share = share
        self.value = 0.0

    def add(self, value: float) -> None:
        self.value += (value - self.value) * (self._share if self.value else 1.0)
