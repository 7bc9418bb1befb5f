"""single-profile-handler."""

from __future__ import annotations

from collections.abc import Sequence

from pointsman.registry import Plugin, register
from pointsman.scheduling.cycle import Cycle


@register("single-profile-handler")
class SingleProfile(Plugin):
    """The only profile, for every request."""

    def profile(self, cycle: Cycle, names: Sequence[str]) -> str:
        return names[0]
