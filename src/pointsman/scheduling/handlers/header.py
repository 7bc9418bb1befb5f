"""header-profile-handler."""

from __future__ import annotations

from collections.abc import Sequence

from pointsman.errors import Saturated
from pointsman.registry import Plugin, register
from pointsman.scheduling.cycle import Cycle


@register("header-profile-handler")
class HeaderProfile(Plugin):
    """The profile named by the request's header, ``defaultProfile`` without it; the only one if there is one.

    A profile that does not exist is answered 429, as llm-d does.
    """

    header_name: str = "EPP-Profile"
    default_profile: str = "decode"

    def profile(self, cycle: Cycle, names: Sequence[str]) -> str:
        if len(names) == 1:
            return names[0]
        wanted = cycle.request.headers.get(self.header_name.lower(), "").strip() or self.default_profile
        if wanted not in names:
            raise Saturated(f"{self.header_name}: there is no scheduling profile {wanted!r}")
        return wanted
