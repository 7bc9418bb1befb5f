"""What a request is promised, or that it can wait: by its headers, and by the class it belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import Annotated

import msgspec
from msgspec import Meta

from pointsman.config import Scheduling
from pointsman.errors import SettingsError
from pointsman.scheduling.slo import promised
from pointsman.types import InferenceRequest

OBJECTIVE_HEADERS = ("x-llm-d-inference-objective", "x-gateway-inference-objective")
"""llm-d's request headers that name an InferenceObjective, new and old (facts 1.3)."""
DEFAULT = "default"
"""The class of requests that name none, or one that is not known."""

PRESET, PICKER = "least-cost", "least-cost-picker"
"""Who knows classes."""

Parameters = Mapping[str, Mapping[str, object]]
Milliseconds = Annotated[float, Meta(ge=0)]


class RequestClass(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """As the setting of that name."""

    ttft_ms: Milliseconds = 0.0
    tpot_ms: Milliseconds = 0.0
    background: bool = False


class Aim(msgspec.Struct, frozen=True, gc=False):
    """What one request is to get."""

    ttft_s: float = inf
    tpot_s: float = inf
    background: bool = False

    @property
    def promised(self) -> bool:
        """It has a limit that others must not break."""
        return not self.background and (self.ttft_s < inf or self.tpot_s < inf)


NOTHING = Aim()
BACKGROUND = Aim(background=True)


class Aims:
    """Classes by name, ready to be asked."""

    def __init__(self, classes: Mapping[str, RequestClass]) -> None:
        self._by_name = {name: _aim(each) for name, each in classes.items()}
        self._default = self._by_name.get(DEFAULT, NOTHING)

    def of(self, request: InferenceRequest) -> Aim | None:
        """The request's own headers before its class; None where nothing is known of it.

        A negative priority is background, too (llm-d calls it sheddable).
        """
        headers = request.headers
        name = next((headers[key] for key in OBJECTIVE_HEADERS if key in headers), "")
        aim = self._by_name.get(name, self._default)
        own = promised(request)
        if own or request.priority < 0:
            background = aim.background or request.priority < 0
            aim = Aim(own.ttft_s or aim.ttft_s, own.tpot_s or aim.tpot_s, background)
        return None if aim == NOTHING else aim


def _aim(given: RequestClass) -> Aim:
    return Aim(given.ttft_ms / 1000 or inf, given.tpot_ms / 1000 or inf, given.background)


def parameters(settings: Scheduling) -> Parameters:
    """The settings' parameters of plugins, with the classes and the objective among them."""
    given: dict[str, object] = {}
    if settings.objective != "seconds":
        given["objective"] = settings.objective
    if settings.classes:
        given["classes"] = {
            name: {"ttftMs": each.ttft_ms, "tpotMs": each.tpot_ms, "background": each.background}
            for name, each in settings.classes.items()
        }
    if not given:
        return settings.parameters
    if settings.picker_config or settings.preset != PRESET:
        policy = settings.picker_config or settings.preset
        raise SettingsError(
            f"scheduling.{', scheduling.'.join(given)}: of the preset {PRESET} only, not of {policy}; "
            f"in a picker configuration they are parameters of its {PICKER}"
        )
    return {**settings.parameters, PICKER: {**settings.parameters.get(PICKER, {}), **given}}
