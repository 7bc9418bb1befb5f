"""Request formats: one file each, which registers what it reads when this package is imported."""

from __future__ import annotations

import importlib
import pkgutil

from pointsman.api.body import passthrough as _passthrough
from pointsman.api.format import Format, find, formats, register

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

from pointsman.api.responses import created_id  # noqa: E402  (its file registers formats, in the order of the rest)

PASSTHROUGH = Format("passthrough", (), _passthrough)
"""For every path that ``find`` does not know: nothing is read, load decides."""

__all__ = ["Format", "PASSTHROUGH", "created_id", "find", "formats", "register"]
