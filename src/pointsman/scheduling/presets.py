"""The named policies, each an EndpointPickerConfig in short, and the one way to a scheduler."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import msgspec

from pointsman.errors import SettingsError
from pointsman.registry import Plugin, hint, plugins
from pointsman.scheduling.cycle import Services
from pointsman.scheduling.interfaces import Scorer
from pointsman.scheduling.picker_config import API_VERSION, KIND, LoadedConfig, load_picker_config, load_tree
from pointsman.scheduling.scheduler import Scheduler
from pointsman.scheduling.sessions import Source

DEFAULT = "least-cost"

Parameters = Mapping[str, Mapping[str, object]]
"""Plugin type to parameters by name; a scorer's ``weight`` is one of them."""

PRESETS: Mapping[str, Parameters] = {
    "least-cost": {"least-cost-picker": {}},
    "llm-d-affinity": {"prefix-cache-affinity-filter": {}, "token-load-scorer": {}, "max-score-picker": {}},
    "llm-d-blend": {
        "queue-scorer": {"weight": 2},
        "kv-cache-utilization-scorer": {"weight": 2},
        "prefix-cache-scorer": {"weight": 3},
        "max-score-picker": {},
    },
    "round-robin": {"round-robin-picker": {}},
    "random": {"weight-scorer": {}, "weighted-random-picker": {}},
    "least-request": {"least-request-scorer": {}, "max-score-picker": {}},
    "power-of-two": {"power-of-two-picker": {}},
    "consistent-hash": {"consistent-hash-picker": {}},
    "bounded-hash": {"consistent-hash-picker": {"loadFactor": 1.05}},
    "cache-aware": {"cache-aware-picker": {}},
    "cache-aware-vllm-router": {
        "cache-aware-picker": {
            "cacheThreshold": 0.3,
            "balanceAbsThreshold": 64,
            "balanceRelThreshold": 1.5,
        }
    },
    "dynamo": {"dynamo-cost-scorer": {}, "max-score-picker": {}},
    "lmetric": {"lmetric-scorer": {}, "max-score-picker": {}},
    "static-capacity": {
        "prefix-cache-scorer": {"weight": 3},
        "capacity-share-scorer": {"weight": 20},
        "max-score-picker": {},
    },
    "learned-capacity": {
        "prefix-cache-scorer": {"weight": 3},
        "capacity-share-scorer": {"weight": 20, "capacity": "learned"},
        "max-score-picker": {},
    },
    "pool-latency-predictor": {"pool-latency-scorer": {}, "max-score-picker": {}},
    "ttft-predictor": {"endpoint-ttft-scorer": {}, "max-score-picker": {}},
}
"""Preset to its plugins, in order, with the parameters that are not left at their defaults.

``cache-aware`` has the numbers that the SGLang router began with. vllm-router 0.1.17 has others, and SMG
1.13 the same as vllm-router, though it compares an endpoint's load with the mean and not with the least.
"""

SESSIONS = "session-affinity-filter"
DETECTOR: Parameters = {"utilization-detector": {"stalenessPolicy": "ignore"}}
"""Unlike in llm-d, stale or missing metrics never reject a request."""
WEIGHT = "weight"


def load_preset(
    name: str,
    *,
    parameters: Parameters | None = None,
    session_headers: Sequence[str] = (),
    session_cookies: Sequence[str] = (),
) -> LoadedConfig:
    """The preset ``name`` with some of its plugins' ``parameters`` changed; requests with equal values of a
    session header or cookie stay together.
    """
    if name not in PRESETS:
        raise SettingsError(f"unknown preset {name!r}{hint(name, PRESETS)} (known: {', '.join(PRESETS)})")
    changes = parameters or {}
    given = {type_: dict(given) for type_, given in {**PRESETS[name], **DETECTOR}.items()}
    _check(changes, given, f"preset {name}: parameters")
    for type_, changed in changes.items():
        given[type_].update(changed)
    uses = [{"pluginRef": type_, WEIGHT: given[type_].pop(WEIGHT, None)} for type_ in PRESETS[name]]
    sources = session_sources(session_headers, session_cookies)
    if sources:
        if "consistent-hash-picker" in given:
            given["consistent-hash-picker"]["sources"] = sources
        given[SESSIONS] = {"strategy": "session_id", "sessionIdConfig": {"sources": sources}}
        uses.insert(0, {"pluginRef": SESSIONS})
    return load_tree(
        {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "plugins": [{"type": type_, "parameters": of_it} for type_, of_it in given.items()],
            "schedulingProfiles": [{"name": "default", "plugins": uses}],
        },
        name,
    )


def _check(changes: Parameters, has: Collection[str], where: str) -> None:
    """Whether the preset ``has`` these plugins and they have these parameters; values are checked when the
    plugins are built."""
    for type_, changed in changes.items():
        if type_ not in has:
            raise SettingsError(f"{where}: it has no {type_}{hint(type_, has)} (it has {', '.join(has)})")
        known = parameter_names(plugins()[type_])
        for key, value in changed.items():
            if key not in known:
                there_are = f"it has {', '.join(known)}" if known else "it has none"
                raise SettingsError(
                    f"{where}: {type_} has no parameter {key}{hint(key, known)} ({there_are})"
                )
            if key == WEIGHT and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise SettingsError(f"{where}: {type_}.{WEIGHT}: {value!r} is not a number")


def parameter_names(cls: type[Plugin]) -> list[str]:
    """What can be set of a plugin, as it is written; of a scorer its weight, too."""
    names = [field.encode_name for field in msgspec.structs.fields(cls) if field.name not in cls.outdated]
    return [WEIGHT, *names] if issubclass(cls, Scorer) else names


def session_sources(headers: Sequence[str], cookies: Sequence[str]) -> list[dict[str, str]]:
    """The session sources of these headers, then cookies, as a picker configuration writes them."""
    sources = [*(Source(header=h) for h in headers), *(Source(cookie=c) for c in cookies)]
    plain: list[dict[str, str]] = msgspec.to_builtins(sources)
    return plain


def load_policy(
    preset: str = DEFAULT,
    *,
    picker_config: str | None = None,
    parameters: Parameters | None = None,
    session_headers: Sequence[str] = (),
    session_cookies: Sequence[str] = (),
) -> LoadedConfig:
    """A preset, or the EndpointPickerConfig text that takes its place."""
    if picker_config is None:
        return load_preset(
            preset,
            parameters=parameters,
            session_headers=session_headers,
            session_cookies=session_cookies,
        )
    if parameters:
        raise SettingsError(
            "scheduling.parameters: they change a preset; write them into the picker configuration instead"
        )
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
