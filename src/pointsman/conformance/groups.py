"""The configurations cases run on: an EndpointPickerConfig, a file of endpoints, and flags, each as llm-d
reads them (facts 3, 10, 11).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import msgspec
import yaml

from pointsman.conformance.engine import Engine

CONFIG_FILE = "epp.yaml"
ENDPOINTS_FILE = "endpoints.yaml"
PLAINTEXT = "--secure-serving=false"
ALPHA = "--allow-experimental-plugins"
"""llm-d does not start with plugins of that stage without it."""

LOAD = MappingProxyType(
    {"queue-scorer": 2.0, "kv-cache-utilization-scorer": 2.0, "lora-affinity-scorer": 3.0}
)


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """A configuration by its name."""

    about: str
    scorers: Mapping[str, float] = LOAD
    """Type to weight."""
    filters: tuple[str, ...] = ()
    parameters: Mapping[str, Mapping[str, object]] = {}
    """Of plugins that do not keep their defaults, by type."""
    parsers: tuple[str, ...] = ()
    """Empty: those the picker has by itself."""
    engines: tuple[str, ...] = ("a", "b", "c")
    listed: tuple[str, ...] | None = None
    """Those of ``engines`` that the file lists at first; None: all."""
    flags: tuple[str, ...] = ()
    tls: bool = False
    """Served with TLS, by a certificate of the picker's own."""

    def start_flags(self, tls: bool) -> tuple[str, ...]:
        """Flags to start the picker with; ``tls`` is for groups that leave it open."""
        return self.flags if self.tls or tls else (PLAINTEXT, *self.flags)


GROUPS: Mapping[str, Group] = {
    "load": Group(about="three endpoints, scored by queue, KV cache and LoRA adapters"),
    "empty": Group(about="no endpoints", engines=()),
    "passthrough": Group(about="bodies are not read", parsers=("passthrough-parser",)),
    "openai-only": Group(about="one parser, named", parsers=("openai-parser",)),
    "scores": Group(about="scores are told", flags=("--emit-endpoint-scores",)),
    "whole-pool": Group(about="subset hints are not looked at", flags=("--disable-endpoint-subset-filter",)),
    "fallbacks": Group(
        about="up to three endpoints a request", parameters={"max-score-picker": {"maxNumOfEndpoints": 3}}
    ),
    "capped": Group(
        about="endpoints with more than five waiting requests are filtered out",
        filters=("utilization-filter",),
        parameters={
            "utilization-filter": {"conditions": [{"metric": "waiting-queue", "maxValue": 5}]},
        },
        flags=(ALPHA,),
    ),
    "session": Group(about="sessions stay", filters=("session-affinity-filter",), flags=(ALPHA,)),
    "prefix": Group(
        about="prefixes stay, unless the queue is much longer",
        scorers={"prefix-cache-scorer": 3.0, "queue-scorer": 1.0},
    ),
    "in-flight": Group(
        about="scored by the requests under way", scorers={"active-request-scorer": 1.0}, engines=("a", "b")
    ),
    "watched": Group(about="the file of endpoints changes", engines=("a", "b"), listed=("a",)),
    "secure": Group(about="TLS by a certificate of the picker's own", tls=True),
}


def write(folder: Path, group: Group, engines: Mapping[str, Engine]) -> None:
    """The group's two files, for these endpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = engines if group.listed is None else group.listed
    write_endpoints(folder, [engines[name] for name in listed])
    document = yaml.safe_dump(config(group, folder / ENDPOINTS_FILE), sort_keys=False)
    (folder / CONFIG_FILE).write_text(
        f"# {group.about}; flags: {' '.join(group.start_flags(False))}\n{document}"
    )


def write_endpoints(folder: Path, engines: Sequence[Engine]) -> None:
    """The file that lists the endpoints, put in place at once."""
    entries = [{"name": e.name, "address": e.host, "port": str(e.port)} for e in engines]
    part = folder / f"{ENDPOINTS_FILE}.part"
    part.write_text(yaml.safe_dump({"endpoints": entries}, sort_keys=False))
    part.replace(folder / ENDPOINTS_FILE)


def config(group: Group, endpoints: Path) -> dict[str, object]:
    """The EndpointPickerConfig."""
    scheduling = [*group.filters, *group.scorers, "max-score-picker"]
    types = {"file-discovery": {"path": str(endpoints), "watchFile": True}}
    types |= {name: dict(group.parameters.get(name, {})) for name in (*scheduling, *group.parsers)}
    plugins = [
        {"type": name} | ({"parameters": parameters} if parameters else {})
        for name, parameters in types.items()
    ]
    uses = [
        {"pluginRef": name} | ({"weight": group.scorers[name]} if name in group.scorers else {})
        for name in scheduling
    ]
    document: dict[str, object] = {
        "apiVersion": "llm-d.ai/v1alpha1",
        "kind": "EndpointPickerConfig",
        "plugins": plugins,
        "schedulingProfiles": [{"name": "default", "plugins": uses}],
        "dataLayer": {"discovery": {"pluginRef": "file-discovery"}},
    }
    if group.parsers:
        document["requestHandler"] = {"parsers": [{"pluginRef": name} for name in group.parsers]}
    return document
