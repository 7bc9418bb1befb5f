"""Results for people and for programs."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from pointsman.conformance.case import LEVELS, Case
from pointsman.conformance.suite import Result, Verdict

WORDS: dict[Verdict, str] = {"pass": "pass", "fail": "FAIL", "skip": "skip"}


def line(result: Result, width: int) -> str:
    """A result in a line; a failure that does not count says so."""
    word = WORDS[result.verdict]
    if result.verdict == "fail" and not result.counts:
        word = "lacks"
    return f"{word:<5}  {result.case.id:<{width}}  {result.reason}".rstrip()


def summary(results: Sequence[Result]) -> str:
    """How many of each, in a line."""
    counts = {
        "passed": sum(r.verdict == "pass" for r in results),
        "failed": sum(r.counts for r in results),
        "lacking (extensions)": sum(r.verdict == "fail" and not r.counts for r in results),
        "skipped": sum(r.verdict == "skip" for r in results),
    }
    return ", ".join(f"{count} {word}" for word, count in counts.items() if count) or "no cases"


def as_json(results: Sequence[Result]) -> str:
    """The results as one JSON document."""
    found = [
        {
            "id": result.case.id,
            "level": result.case.level,
            "group": result.case.group,
            "required": result.case.required,
            "source": result.case.source,
            "verdict": result.verdict,
            "reason": result.reason,
        }
        for result in results
    ]
    conforms = not any(result.counts for result in results)
    document = {"conforms": conforms, "summary": summary(results), "cases": found}
    return msgspec.json.format(msgspec.json.encode(document), indent=2).decode()


def listing(cases: Sequence[Case]) -> str:
    """What the suite asks for, without running it."""
    lines = [f"{level}: {text}" for level, text in LEVELS.items()]
    for case in cases:
        lines += ["", f"{case.id}  ({case.level}, {case.group or 'not tried'})", f"  {case.required}"]
        lines.append(f"  source: {case.source}")
        if case.skipped:
            lines.append(f"  not tried: {case.skipped}")
    return "\n".join(lines)
