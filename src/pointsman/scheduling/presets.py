"""The named policies, each an EndpointPickerConfig in short, and the one way to a scheduler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from pointsman.errors import SettingsError
from pointsman.registry import hint
from pointsman.scheduling.cycle import Services
from pointsman.scheduling.picker_config import API_VERSION, KIND, LoadedConfig, load_picker_config, load_tree
from pointsman.scheduling.scheduler import Scheduler
from pointsman.scheduling.sessions import Source

DEFAULT = "llm-d-affinity"

PRESETS: Mapping[str, Mapping[str, float | None]] = {
    "llm-d-affinity": {
        "prefix-cache-affinity-filter": None,
        "token-load-scorer": 1.0,
        "max-score-picker": None,
    },
    "llm-d-blend": {
        "queue-scorer": 2.0,
        "kv-cache-utilization-scorer": 2.0,
        "prefix-cache-scorer": 3.0,
        "max-score-picker": None,
    },
    "round-robin": {"round-robin-picker": None},
    "random": {"weight-scorer": 1.0, "weighted-random-picker": None},
    "least-request": {"least-request-scorer": 1.0, "max-score-picker": None},
    "power-of-two": {"power-of-two-picker": None},
    "consistent-hash": {"consistent-hash-picker": None},
}
"""Preset to its plugins in order, scorers with their weight."""

SESSIONS = "session-affinity-filter"
DETECTOR = {"type": "utilization-detector", "parameters": {"stalenessPolicy": "ignore"}}
"""Unlike in llm-d, stale or missing metrics never reject a request."""


def load_preset(
    name: str, *, session_headers: Sequence[str] = (), session_cookies: Sequence[str] = ()
) -> LoadedConfig:
    """The preset ``name``; requests with equal values of a session header or cookie stay together."""
    if name not in PRESETS:
        raise SettingsError(f"unknown preset {name!r}{hint(name, PRESETS)} (known: {', '.join(PRESETS)})")
    specs: dict[str, dict[str, Any]] = {type_: {"type": type_} for type_ in PRESETS[name]}
    uses: list[dict[str, Any]] = [{"pluginRef": t, "weight": w} for t, w in PRESETS[name].items()]
    sources = session_sources(session_headers, session_cookies)
    if sources:
        if "consistent-hash-picker" in specs:
            specs["consistent-hash-picker"]["parameters"] = {"sources": sources}
        parameters = {"strategy": "session_id", "sessionIdConfig": {"sources": sources}}
        specs[SESSIONS] = {"type": SESSIONS, "parameters": parameters}
        uses.insert(0, {"pluginRef": SESSIONS})
    return load_tree(
        {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "plugins": [*specs.values(), DETECTOR],
            "schedulingProfiles": [{"name": "default", "plugins": uses}],
        },
        name,
    )


def session_sources(headers: Sequence[str], cookies: Sequence[str]) -> list[dict[str, str]]:
    """The session sources of these headers, then cookies, as a picker configuration writes them."""
    sources = [*(Source(header=h) for h in headers), *(Source(cookie=c) for c in cookies)]
    plain: list[dict[str, str]] = msgspec.to_builtins(sources)
    return plain


def load_policy(
    preset: str = DEFAULT,
    *,
    picker_config: str | None = None,
    session_headers: Sequence[str] = (),
    session_cookies: Sequence[str] = (),
) -> LoadedConfig:
    """A preset, or the EndpointPickerConfig text that takes its place."""
    if picker_config is None:
        return load_preset(preset, session_headers=session_headers, session_cookies=session_cookies)
    if session_headers or session_cookies:
        raise SettingsError(
            "scheduling.session_headers, session_cookies: with a picker configuration, "
            f"use its own {SESSIONS} instead"
        )
    return load_picker_config(picker_config)


def build_scheduler(policy: LoadedConfig, services: Services) -> Scheduler:
    """A scheduler for the policy; ``services`` are configured by its producers."""
    return Scheduler(
        policy.profiles,
        services,
        handler=policy.handler,
        plugins=policy.plugins,
        detector=policy.detector,
    )
