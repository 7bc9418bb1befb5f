"""Request formats: one file each, which registers what it reads when this package is imported."""

from __future__ import annotations

import importlib
import pkgutil

from pointsman.api.format import PASSTHROUGH, Format, find, formats, register
from pointsman.api.responses import created_id, makes_state

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["Format", "PASSTHROUGH", "created_id", "find", "formats", "makes_state", "register"]
