"""docs/reference/workloads.md, written from the families: ``python -m
pointsman.bench.workloads.reference``.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any, get_args

import msgspec
import yaml
from msgspec import structs

from pointsman.bench.pace import Bursts, Day
from pointsman.bench.workloads.family import metas
from pointsman.bench.workloads.lengths import Lengths
from pointsman.bench.workloads.reading import KINDS
from pointsman.bench.workloads.slo_classes import READY_MADE, Part

INTRODUCTION = """\
# Workloads

Written by `python -m pointsman.bench.workloads.reference`; do not edit. What is sent: `workload` in a
scenario of `pointsman simulate`, `--workload` of `pointsman bench`. A workload is named by its `kind` and
makes calls from its parameters and the seed alone: equal ones make equal calls, byte for byte, whatever the
servers do. When calls are due is the load's business ([bench.md](bench.md#load)), except for a trace.

```yaml
workload:
  kind: conversations
  turns: 8
  output_len: 400
  output_shape: {shape: lognormal, cv: 0.8}
```

```
pointsman bench http://localhost:8080 --rate 5 --workload conversations --set turns=8 --set output_len=400
pointsman bench http://localhost:8080 --rate 5 --workload chat.yaml
```

`chat.yaml` then has what stands under `workload` above. A parameter that is misspelt or out of bounds is
named.

| for | `workload` |
|---|---|
| the case study | `{kind: shared-prefix, groups: 150, system_prompt_len: 6000, question_len: 1200, \
output_len: 1000}` |
| more prefixes than the caches hold | the same with `groups: 600` |
| some tenants busier than others, and not always the same | the same with `zipf: 1.1, hot_for_calls: 2000` |
| questions about a few long documents among short prompts | `{kind: mixed-lengths, documents: 10}` |
| a router that is told how long outputs will be | `{kind: decode-heavy, tell_max_tokens: true}` |
| adapters in chats | `{kind: lora, adapters: 8, of: {kind: conversations}}` |
| people, agents and batch jobs, each with limits | `{kind: slo-classes, classes: 3}` |

Lengths are in tokens of four bytes. Prompts are made when they are due; what they share is made once and
kept, up to 256 MB of it (the cycle of `shared-prefix` keeps each of its prompts, however many). How long an
output will be, a router learns only with `tell_max_tokens`; over HTTP it always does, since `max_tokens` is
what makes an engine stop.

**Calls that follow.** A conversation's next turn and an agent's next step are due when the call before has
ended well, and its think time after. Rates, `requests` and the places of a closed loop count conversations
and trees, not their calls: with 5 turns on average, 2 a second come to 10 requests a second. Over HTTP,
later prompts go on from an answer that was made up beforehand, not from what the server said, so that what
it generated is not found in its cache again.
"""
SHAPES = """\
## Shapes of lengths

Where a length has a `_shape`, the length is the mean and the shape says how it varies, as `{shape:
exponential}`.
"""
ARRIVALS = """\
## Arrivals

When calls of an open loop are due: `arrivals` of a scenario's stage, `--arrivals` of `pointsman bench`. By
name (`poisson`, the default, `constant`, `bursts`, `day`) or with parameters: `{kind: bursts, cv: 3}` in a
file, `bursts,cv=3` as an option. `poisson` has exponential gaps, `constant` equal ones.
"""


def page() -> str:
    """The whole page."""
    lines = [INTRODUCTION, "| kind | what it is |", "|---|---|"]
    lines += [f"| [`{kind}`](#{kind}) | {_first_sentence(cls)} |" for kind, cls in KINDS.items()]
    for kind, cls in KINDS.items():
        lines += ["", f"## {kind}", "", _text(cls), "", *_table(cls)]
    lines += ["", "### Each of `parts`", "", _text(Part), "", *_table(Part), "", *_ready_made()]
    lines += ["", SHAPES, "| shape | parameters | what it is |", "|---|---|---|"]
    lines += [
        f"| `{cls.__struct_config__.tag}` | {'; '.join(_inline(cls))} | {_text(cls)} |"
        for cls in get_args(Lengths)
    ]
    lines += ["", ARRIVALS]
    for process in (Bursts, Day):
        lines += [f"**`{process.__struct_config__.tag}`.** {_text(process)}", "", *_table(process), ""]
    return "\n".join(lines).rstrip() + "\n"


def _table(cls: type[msgspec.Struct]) -> Iterator[str]:
    yield "| parameter | default | what it is |"
    yield "|---|---|---|"
    for field in structs.fields(cls):
        default = "required" if field.required else f"`{_brief(field.default)}`"
        yield f"| `{field.name}` | {default} | {_said(field)} |"


def _inline(cls: type[msgspec.Struct]) -> Iterator[str]:
    for field in structs.fields(cls):
        yield f"`{field.name}={_brief(field.default)}`: {_said(field)}"


def _ready_made() -> Iterator[str]:
    yield "The ready-made classes:"
    yield ""
    yield "| `classes` | name | weight | `ttft_s` | `tpot_s` | calls |"
    yield "|---|---|---|---|---|---|"
    for count, parts in READY_MADE.items():
        for part in parts:
            limits = f"{part.ttft_s:g} | {part.tpot_s:g}"
            yield f"| {count} | {part.name} | {part.weight:g} | {limits} | `{_brief(part.of)}` |"


def _said(field: structs.FieldInfo) -> str:
    return "; ".join(meta.description for meta in metas(field.type) if meta.description)


def _brief(value: Any) -> str:
    """A value as YAML on one line, without what a family has by default."""
    text = yaml.safe_dump(_plain(value), default_flow_style=True, sort_keys=False, width=1000)
    return text.removesuffix("\n").removesuffix("\n...")


def _plain(value: Any) -> Any:
    if not isinstance(value, msgspec.Struct):
        return list(value) if isinstance(value, tuple) else value
    config = value.__struct_config__
    plain = {config.tag_field: config.tag} if config.tag_field else {}
    changed = [
        field
        for field in structs.fields(value)
        if field.required or getattr(value, field.name) != field.default
    ]
    return plain | {field.name: _plain(getattr(value, field.name)) for field in changed}


def _text(cls: type) -> str:
    return re.sub(r"\s+", " ", inspect.getdoc(cls) or "").replace("``", "`")


def _first_sentence(cls: type) -> str:
    return _text(cls).split(". ")[0].split(": ")[0].rstrip(".")


if __name__ == "__main__":
    print(page(), end="")
