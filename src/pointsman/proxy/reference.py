"""docs/reference/metrics.md, from the families themselves: ``python -m pointsman.proxy.reference``."""

from __future__ import annotations

from collections.abc import Sequence

from pointsman.config import load
from pointsman.proxy.application import Application

HEAD = """\
# Metrics

Written by `python -m pointsman.proxy.reference`; do not edit. The admin port serves them at `/metrics` in
Prometheus' text format. Counters end in `_total`; histograms have `_bucket`, `_sum` and `_count`.

Labels are bounded: `endpoint` is a name of the pool, `model` one that endpoints serve, `reason` one of our
own words.

| metric | type | labels | what it is |
|---|---|---|---|"""


def page() -> str:
    """The whole reference page."""
    everything = load(None, ["shared_index.redis=redis://127.0.0.1"], ["http://127.0.0.1:1"])
    application = Application(everything)
    lines = [HEAD]
    for family in application.core.telemetry.collect():
        name = family.name + ("_total" if family.type == "counter" else "")
        names: Sequence[str] = family._labelnames  # type: ignore[attr-defined]  # it has no public name
        labels = " ".join(f"`{label}`" for label in names)
        lines.append(f"| `{name}` | {family.type} | {labels} | {family.documentation} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
