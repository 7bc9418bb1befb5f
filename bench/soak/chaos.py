"""What goes wrong, at which engine and when: a plan from a seed, and the record of what really was done."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

REST_S = 1.0
"""An engine counts as bad for so long after its fault: streams that the fault was dealt to may still run."""
SLACK_S = 0.3
"""How far our clock and the engines' may differ on when a fault was."""
HARMLESS = frozenset({"slow"})
"""Kinds that must not cost anybody an answer."""

Fields = dict[str, float | int]
KINDS: dict[str, tuple[int, Callable[[random.Random], Fields]]] = {
    "crash": (5, lambda r: {"for_s": r.uniform(0.5, 6)}),
    "restart": (2, lambda r: {}),
    "refuse": (2, lambda r: {"for_s": r.uniform(0.5, 4)}),
    "freeze": (2, lambda r: {"for_s": r.uniform(0.5, 5)}),
    "hang": (4, lambda r: {"for_s": r.uniform(0.5, 6)}),
    "stall": (3, lambda r: {"for_s": r.uniform(0.5, 5), "after_chunks": r.randint(1, 12)}),
    "close": (2, lambda r: {"for_s": r.uniform(0.5, 2), "every": 2} | _somewhere(r)),
    "reset": (2, lambda r: {"for_s": r.uniform(0.5, 2), "every": 2} | _somewhere(r)),
    "garbage": (1, lambda r: {"for_s": r.uniform(0.5, 2), "every": 2} | _somewhere(r)),
    "busy": (3, lambda r: {"for_s": r.uniform(0.5, 4), "status": r.choice((429, 503)), "retry_after": 1}),
    "error": (1, lambda r: {"for_s": r.uniform(0.2, 1), "status": 500, "every": 2}),
    "slow": (3, lambda r: {"for_s": r.uniform(1, 6), "factor": r.uniform(1.5, 3)}),
}
"""Weight and parameters by name. A restart is over at once; the others end by themselves."""
_STATUS = frozenset({"busy", "error"})


def _somewhere(rng: random.Random) -> Fields:
    """In the middle of the answer, or before its first byte."""
    return {"after_chunks": rng.randint(1, 20)} if rng.random() < 0.5 else {}


@dataclass(frozen=True)
class Event:
    """``kind`` happens to engine number ``engine`` at ``at_s``, with these fields of the fault API."""

    at_s: float
    engine: int
    kind: str
    fields: Fields

    @property
    def for_s(self) -> float:
        return self.fields.get("for_s", 0.0)

    @property
    def fault(self) -> dict[str, object]:
        """As the engines' fault API takes it."""
        return {"kind": "status" if self.kind in _STATUS else self.kind, **self.fields}


def plan(rng: random.Random, duration_s: float, engines: int, mean_gap_s: float = 0.8) -> list[Event]:
    """Events of ``duration_s`` seconds, in order; never more than half of the engines are bad at a time."""
    events: list[Event] = []
    bad_until_s: dict[int, float] = {}
    now_s = rng.expovariate(1 / mean_gap_s)
    while now_s < duration_s:
        well = [e for e in range(engines) if bad_until_s.get(e, 0.0) <= now_s]
        if engines - len(well) < engines // 2:
            kind = rng.choices(list(KINDS), [weight for weight, _ in KINDS.values()])[0]
            event = Event(now_s, rng.choice(well), kind, KINDS[kind][1](rng))
            bad_until_s[event.engine] = now_s + event.for_s + REST_S
            events.append(event)
        now_s += rng.expovariate(1 / mean_gap_s)
    return events


@dataclass
class Window:
    """A fault that was in force at ``engine`` between two times of the harness's clock."""

    engine: str
    kind: str
    from_s: float
    to_s: float


@dataclass
class Record:
    """Every fault that was inflicted, and so the answer to "was it that engine's fault?"."""

    windows: list[Window] = field(default_factory=list)

    def add(self, engine: str, event: Event, asked_s: float, done_s: float) -> None:
        """``event`` took effect between ``asked_s`` and ``done_s``."""
        self.windows.append(Window(engine, event.kind, asked_s, done_s + event.for_s))

    def end_all(self, now_s: float) -> None:
        """Every fault has been lifted."""
        for window in self.windows:
            window.to_s = min(window.to_s, now_s)

    def kinds(self, engine: str, from_s: float, to_s: float) -> set[str]:
        """Faults that may have harmed a request which was at ``engine`` between these times."""
        return {
            w.kind
            for w in self.windows
            if w.engine == engine
            and w.kind not in HARMLESS
            and w.from_s - SLACK_S <= to_s
            and from_s <= w.to_s + SLACK_S
        }

    def blamed(self, tried: Sequence[str], from_s: float, to_s: float) -> bool:
        """Whether every endpoint in ``tried`` had a fault meanwhile."""
        return bool(tried) and all(self.kinds(engine, from_s, to_s) for engine in tried)
