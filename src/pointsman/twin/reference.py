"""docs/reference/scenario.md, written from the structs: ``python -m pointsman.twin.reference``."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import msgspec
import yaml
from msgspec import structs

from pointsman.bench.report import Slo
from pointsman.bench.run import Load
from pointsman.sim.spec import FleetItem
from pointsman.sim.variants import Variants
from pointsman.twin.gateway import RouterCost
from pointsman.twin.kv_events import KvEvents
from pointsman.twin.routers import Routers
from pointsman.twin.scenario import Incident, Scenario

INTRODUCTION = """\
# Scenario files

Written by `python -m pointsman.twin.reference`; do not edit. What [`pointsman simulate`](../simulate.md) is
told: YAML (or JSON) with these keys. A key that is misspelt or out of bounds stops the command, which names
it; `--set stages.1.rate=40` changes one on the command line. Files to begin with are in `examples/twin`.
"""
SECTIONS: dict[str, type[msgspec.Struct]] = {
    "engines[]": FleetItem,
    "stages[]": Load,
    "incidents[]": Incident,
    "router": RouterCost,
    "routers": Routers,
    "kv_events": KvEvents,
    "slo, classes.*": Slo,
}
LONG_DEFAULTS = {"engines": "the case study's 20", "workload": "the case study's"}
OF_VLLM = "As vLLM's option."
ELSEWHERE = {
    "accelerator": "[One of those measured](engine.md#the-engine-model)",
    "name": "By default the accelerator's; of several, with a number",
    "labels": "As of a pod, for filters and scorers by label",
    "count": "Engines alike; `names` has one name each.",
    "names": "Of engines alike, instead of `count`.",
    "kv_tokens": "Size of its KV cache; by default its profile's",
    "block_tokens": "Tokens of a KV block; by default its profile's",
    "concurrency": "Requests at once, closed loop.",
    "cores": "On which its work is spread.",
    "ttft_s": "From sending to the first token.",
    "tpot_s": "Mean of each token after the first.",
}
"""Keys that the structs have nothing to say of."""
UNUSED = ("port", "base_port", "kv_events", "data_parallel_rank")
"""Keys of engines that are for HTTP servers."""


def page() -> str:
    """The whole page."""
    lines = [INTRODUCTION, *_section(Scenario)]
    for name, cls in SECTIONS.items():
        lines += ["", f"## {name}", "", *_section(cls)]
    return "\n".join(lines) + "\n"


def _section(cls: type[msgspec.Struct]) -> Iterator[str]:
    yield _plain(inspect.getdoc(cls) or "")
    yield ""
    yield "| key | default | what it is |"
    yield "|---|---|---|"
    said = said_of(cls)
    inherited = {field.name for field in structs.fields(Variants)} if issubclass(cls, Variants) else set()
    for field in structs.fields(cls):
        if field.name not in inherited and not (cls is FleetItem and field.name in UNUSED):
            text = _plain(said.get(field.name) or ELSEWHERE.get(field.name) or OF_VLLM)
            yield f"| `{field.name}` | {_default(field)} | {text} |"
    if inherited:
        names = ", ".join(f"`{name}`" for name in sorted(inherited))
        yield f"| {names} | off | [variants](engine.md#variants) of the engine model |"


def said_of(cls: type) -> dict[str, str]:
    """What the strings under the fields of a class say of them."""
    said: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        if not issubclass(each, msgspec.Struct) or each is msgspec.Struct:
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
        assert isinstance(definition, ast.ClassDef)
        field = None
        for node in definition.body:
            if field is not None and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                said[field] = str(node.value.value)
            field = ast.unparse(node.target) if isinstance(node, ast.AnnAssign) else None
    return said


def _default(field: structs.FieldInfo) -> str:
    if field.required:
        return "required"
    if field.name in LONG_DEFAULTS:
        return LONG_DEFAULTS[field.name]
    value: Any = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
    if value is None or value == "":
        return ""
    plain = msgspec.to_builtins(value, order="deterministic")
    text = yaml.safe_dump(_set(plain), default_flow_style=True, sort_keys=False, width=1000)
    return f"`{text.strip().removesuffix('...').strip()}`"


def _set(value: Any) -> Any:
    """Without the keys of a stage that are None or as they always are."""
    if isinstance(value, dict):
        return {key: _set(of_it) for key, of_it in value.items() if of_it is not None and of_it != "poisson"}
    return [_set(each) for each in value] if isinstance(value, list | tuple) else value


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("``", "`").strip()


if __name__ == "__main__":
    print(page(), end="")
