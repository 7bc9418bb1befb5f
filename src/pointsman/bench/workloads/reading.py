"""A workload from a file, or by the name of its kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import msgspec

from pointsman.bench.workloads import AnyWorkload
from pointsman.config import convert, override, read_yaml
from pointsman.errors import SettingsError

KINDS: Mapping[str, type[msgspec.Struct]] = {
    str(cls.__struct_config__.tag): cls for cls in get_args(AnyWorkload)
}
"""Families by what files call them."""


class _File(msgspec.Struct):
    workload: AnyWorkload


def read_workload(
    source: str, overrides: Sequence[str] = (), parameters: Mapping[str, Any] | None = None
) -> AnyWorkload:
    """A kind with its defaults, or what a YAML file says; then ``parameters``, then ``a.b=c`` overrides.
    ``SettingsError`` names the key that is wrong.
    """
    if source in KINDS:
        tree: dict[str, Any] = {"kind": source}
    elif Path(source).is_file():
        tree = read_yaml(Path(source))
    else:
        raise SettingsError(f"workload: {source}: no such file, and no kind; kinds are {', '.join(KINDS)}")
    tree |= parameters or {}
    for text in overrides:
        override(tree, text)
    where = "docs/reference/workloads.md lists them"
    return convert({"workload": tree}, _File, source, lists=where).workload
