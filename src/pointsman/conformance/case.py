"""A conformance case: what is required, who says so, and the function that tries it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Literal

import msgspec

from pointsman.conformance.subject import Subject

Trial = Callable[[Subject], Awaitable[None]]
Level = Literal["protocol", "llm-d", "extension"]
LEVELS: dict[Level, str] = {
    "protocol": "the Endpoint Picker Protocol or Envoy's ext_proc; every picker",
    "llm-d": "what llm-d's picker does, and its users rely on",
    "extension": "not required; a failure is shown and does not count",
}

PROTOCOL = "Gateway API Inference Extension: endpoint picker protocol"
ENVOY = "Envoy: ext_proc v3 API"
MEASURED = "measured with Envoy 1.40"
LLMD = "llm-d-router, ext_proc server (August 2026)"
LLMD_TESTS = "llm-d-router, test/integration/epp (August 2026)"
OURS = "ours"
"""Sources."""


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One case. Its id is unique and stays."""

    id: str
    level: Level
    group: str
    """The configuration it runs on, see ``groups``."""
    required: str
    """In a sentence."""
    source: str
    trial: Trial | None = None
    """Raises ``Failed``; None where ``skipped`` says why it cannot be tried."""
    skipped: str = ""


CASES: dict[str, Case] = {}
"""In the order in which they are written."""


def case(
    id_: str, required: str, source: str, *, group: str = "load", level: Level = "llm-d"
) -> Callable[[Trial], Trial]:
    """Make a function the case ``id_``."""

    def add(trial: Trial) -> Trial:
        _add(Case(id=id_, level=level, group=group, required=required, source=source, trial=trial))
        return trial

    return add


def not_tried(id_: str, required: str, source: str, why: str, level: Level = "llm-d") -> None:
    """A requirement that the suite knows and cannot try."""
    _add(Case(id=id_, level=level, group="", required=required, source=source, skipped=why))


def _add(found: Case) -> None:
    assert found.id not in CASES, f"two cases are called {found.id}"
    CASES[found.id] = found
