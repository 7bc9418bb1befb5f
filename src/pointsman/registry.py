"""Plugins by name: a file that says ``@register("name")`` in a plugin folder is the whole change."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import entry_points
from typing import Any, ClassVar, TypeVar

import msgspec

from pointsman.errors import SettingsError


class Plugin(msgspec.Struct, rename="camel", forbid_unknown_fields=True, kw_only=True, dict=True):
    """Base of every plugin: the struct's fields are its YAML parameters, in camelCase as llm-d writes them.

    State that is not a parameter is set in ``__post_init__``; a ``ValueError`` there is the user's mistake.
    What a plugin can do is told by its methods, see ``scheduling.interfaces``.
    """

    producers: ClassVar[Mapping[str, str]] = {}
    """Fields that name another plugin, and the type that one must have."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Types of which one instance must exist; those not configured are added with their defaults."""
    replaced_by: ClassVar[str] = ""
    """Type to use instead of this one, which only old configurations have."""
    outdated: ClassVar[Mapping[str, str]] = {}
    """Fields that only old configurations have, and what to do instead."""
    unused: ClassVar[Mapping[str, str]] = {}
    """Parameters that may be given and change nothing, as written and with dots where nested, and why."""


P = TypeVar("P", bound=type[Plugin])

_plugins: dict[str, type[Plugin]] = {}
_own_names: dict[type[Plugin], str] = {}

FOLDERS = ("pointsman.scheduling",)
ENTRY_POINTS = "pointsman.plugins"


def register(*names: str) -> Callable[[P], P]:
    """Make a plugin class known under ``names``; the first is its own, the others are older spellings."""

    def add(cls: P) -> P:
        for name in names:
            assert name not in _plugins, f"two plugins are called {name}"
            _plugins[name] = cls
        _own_names[cls] = names[0]
        return cls

    return add


def load_plugins() -> None:
    """Import every plugin folder and everything installed under the entry point ``pointsman.plugins``."""
    for folder in FOLDERS:
        package = importlib.import_module(folder)
        for found in pkgutil.walk_packages(package.__path__, folder + "."):
            importlib.import_module(found.name)
    for entry in entry_points(group=ENTRY_POINTS):
        entry.load()


def plugins() -> Mapping[str, type[Plugin]]:
    """Every registered plugin class by name, aliases included."""
    load_plugins()
    return _plugins


def own_name(cls: type[Plugin]) -> str:
    """The name a plugin class goes by; the other ones it was registered under are older spellings."""
    return _own_names[cls]


def hint(name: str, known: Iterable[str]) -> str:
    """``; did you mean ...?`` when something known is spelt much like ``name``, else nothing."""
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def build(name: str, parameters: Mapping[str, Any] | None, where: str) -> Plugin:
    """An instance of plugin ``name``. ``where`` (the settings key) leads the message when something does
    not fit.
    """
    known = plugins()
    cls = known.get(name)
    if cls is None:
        raise SettingsError(f"{where}: unknown plugin type {name!r}{hint(name, known)}")
    try:
        return msgspec.convert(dict(parameters or {}), cls)
    except msgspec.ValidationError as exc:
        raise SettingsError(f"{where}: {name}: {exc}") from exc
