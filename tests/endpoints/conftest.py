"""Clocks, targets and recorded metrics pages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pointsman.config import Endpoint as Settings
from pointsman.endpoints.target import Target, targets_of

PAGES = Path(__file__).parent / "pages"


class Clock:
    """Stands still until it is set."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def target() -> Callable[..., Target]:
    """An endpoint at ``http://NAME:8000``; fields of its settings as keywords."""

    def make(name: str, **fields: object) -> Target:
        return targets_of(Settings(url=f"http://{name}:8000", name=name, **fields))[0]  # type: ignore[arg-type]

    return make


@pytest.fixture
def page() -> Callable[[str], bytes]:
    """A recorded page by the name of its file."""
    return lambda name: (PAGES / f"{name}.txt").read_bytes()
