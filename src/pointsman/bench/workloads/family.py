"""What the families of workloads have in common: parameters that are described and checked where they are
declared, and the tag by which a file names the family.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import cache
from typing import Annotated, Any, TypeAlias

import msgspec
from msgspec import Meta, structs

from pointsman.errors import SettingsError

Count: TypeAlias = Annotated[int, Meta(ge=1)]
Tokens: TypeAlias = Annotated[int, Meta(ge=0)]
Share: TypeAlias = Annotated[float, Meta(ge=0, le=1)]
Seconds: TypeAlias = Annotated[float, Meta(ge=0)]
Positive: TypeAlias = Annotated[float, Meta(gt=0)]
Exponent: TypeAlias = Annotated[float, Meta(ge=0)]


def says(description: str) -> Meta:
    """What a parameter is, for the reference page."""
    return Meta(description=description)


class Checked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Refuses a value out of its bounds whoever makes it; msgspec by itself looks at files only."""

    def __post_init__(self) -> None:
        for name, bounds in _bounds(type(self)):
            value = getattr(self, name)
            for word, holds, bound in _LIMITS:
                limit = getattr(bounds, bound)
                if limit is not None and not holds(value, limit):
                    raise SettingsError(f"{name}: must be {word} {limit:g}")


class Family(Checked, frozen=True, kw_only=True, tag_field="kind"):
    """Calls made from parameters and a seed. Lengths are tokens; ``_len`` is a mean where a shape varies
    it.
    """

    tell_max_tokens: Annotated[bool, says("tell the router each output's length, as max_tokens would")] = (
        False
    )

    def told(self, output_tokens: int) -> int | None:
        """What a call says of its output's length."""
        return output_tokens if self.tell_max_tokens else None


_LIMITS: tuple[tuple[str, Callable[[float, float], bool], str], ...] = (
    ("at least", operator.ge, "ge"),
    ("above", operator.gt, "gt"),
    ("at most", operator.le, "le"),
    ("below", operator.lt, "lt"),
)


@cache
def _bounds(cls: type[msgspec.Struct]) -> list[tuple[str, Meta]]:
    return [(field.name, meta) for field in structs.fields(cls) for meta in metas(field.type)]


def metas(kind: Any) -> list[Meta]:
    """What is annotated to a field's type."""
    return [meta for meta in getattr(kind, "__metadata__", ()) if isinstance(meta, Meta)]
