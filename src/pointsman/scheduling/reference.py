"""docs/reference/plugins.md, written from the registry: ``python -m pointsman.scheduling.reference``."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from pointsman.registry import Plugin, own_name, plugins
from pointsman.scheduling.coming import COMING
from pointsman.scheduling.interfaces import (
    Admitter,
    Filter,
    Picker,
    ProfileHandler,
    SaturationDetector,
    Scorer,
)
from pointsman.scheduling.presets import DEFAULT, PRESETS

KINDS: dict[str, type] = {
    "filter": Filter,
    "scorer": Scorer,
    "picker": Picker,
    "profile handler": ProfileHandler,
    "saturation detector": SaturationDetector,
    "admitter": Admitter,
}
INTRODUCTION = """\
# Plugins

Written by `python -m pointsman.scheduling.reference`; do not edit. Names, parameters and defaults are
llm-d's where llm-d has such a plugin. [llm-d-config.md](../llm-d-config.md) tells how a configuration is
read.

## Available

| type | kind | parameters | what it does |
|---|---|---|---|"""

PRESETS_INTRODUCTION = """\
In parentheses the parameters that are not left at their defaults. Any of them, and a scorer's weight, which
is 1 by default, can be changed with the setting `scheduling.parameters`:
`--set scheduling.parameters.prefix-cache-scorer.weight=5`."""


def kinds(cls: type[Plugin]) -> list[str]:
    """What a plugin class can be, in words."""
    return [word for word, kind in KINDS.items() if issubclass(cls, kind)]


def parameters(cls: type[Plugin]) -> Iterator[str]:
    """``name=default`` of each parameter; required ones stand alone."""
    for field in msgspec.structs.fields(cls):
        if field.name in cls.outdated:
            continue
        if field.required:
            yield f"`{field.encode_name}`"
            continue
        default = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
        yield f"`{field.encode_name}={_plain(default)}`"


def _plain(value: Any) -> str:
    return msgspec.json.encode(value).decode() if value != "" else '""'


def summary(cls: type[Plugin]) -> str:
    """The docstring on one line."""
    return re.sub(r"\s+", " ", inspect.getdoc(cls) or "").replace("``", "`").replace("|", "\\|")


def _use(type_: str, given: Mapping[str, object]) -> str:
    """A preset's use of a plugin."""
    said = ", ".join(f"{key} {_plain(value)}" for key, value in given.items())
    return f"`{type_}`" + (f" ({said})" if said else "")


def page() -> str:
    """The whole reference page."""
    known = plugins()
    lines = [INTRODUCTION]
    for name in sorted(name for name, cls in known.items() if own_name(cls) == name):
        cls = known[name]
        aliases = sorted(alias for alias in known if known[alias] is cls and alias != name)
        title = f"`{name}`" + "".join(f"<br>(old name `{alias}`)" for alias in aliases)
        kind = ", ".join(kinds(cls)) or "configuration"
        lines.append(f"| {title} | {kind} | {' '.join(parameters(cls))} | {summary(cls)} |")
    lines += ["", "## Presets", "", PRESETS_INTRODUCTION, "", "| preset | plugins |", "|---|---|"]
    for name, used in PRESETS.items():
        parts = [_use(type_, given) for type_, given in used.items()]
        lines.append(f"| `{name}`{' (default)' if name == DEFAULT else ''} | {', '.join(parts)} |")
    lines += [
        "",
        "## Known, not available in this version",
        "",
        "A configuration that uses one of these does not start.",
        "",
        "| type | belongs to |",
        "|---|---|",
        *(f"| `{name}` | {area} |" for name, area in COMING.items()),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
