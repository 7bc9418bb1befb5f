"""What is compared: a policy is a named preset, perhaps with parameters, or a picker configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import msgspec
import yaml

from pointsman.config import read_text
from pointsman.errors import SettingsError
from pointsman.registry import hint
from pointsman.scheduling.picker_config import LoadedConfig
from pointsman.scheduling.presets import DEFAULT, PRESETS, Parameters, load_policy

ALIASES: Mapping[str, str] = {"default": DEFAULT, "k8s-random": "random"}
"""Names that say what a policy stands for here; Kubernetes' own balancing is as good as random."""

FILES = (".yaml", ".yml", ".json")


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """How an endpoint is chosen, and what tables call it."""

    name: str
    preset: str = DEFAULT
    picker_config: str | None = None
    """Text of an EndpointPickerConfig; takes the preset's place."""
    parameters: Parameters = {}
    """Of the preset's plugins, where they are not the preset's own."""

    def load(self) -> LoadedConfig:
        """Fresh plugins: what one run has learned is not for the next."""
        return load_policy(self.preset, picker_config=self.picker_config, parameters=self.parameters)

    def having(self, settings: Mapping[str, object]) -> Policy:
        """The same with some ``plugin.parameter`` set; its name says so, in the form ``policy`` reads."""
        if not settings:
            return self
        parameters = {plugin: dict(of_it) for plugin, of_it in self.parameters.items()}
        for key, value in settings.items():
            plugin, _, name = key.partition(".")
            parameters.setdefault(plugin, {})[name] = value
        told = ",".join(f"{key}={msgspec.json.encode(value).decode()}" for key, value in settings.items())
        name = f"{self.name}{',' if ':' in self.name else ':'}{told}"
        return msgspec.structs.replace(self, name=name, parameters=parameters)


def policy(name: str) -> Policy:
    """The preset of that name, perhaps with ``:plugin.parameter=value,...``, or the EndpointPickerConfig in a
    file; ``SettingsError`` if there is none.
    """
    path = Path(name)
    if path.suffix in FILES:
        return Policy(name=path.stem, picker_config=read_text(path))
    preset, _, settings = name.partition(":")
    found = ALIASES.get(preset, preset)
    if found not in PRESETS:
        known = (*ALIASES, *PRESETS)
        raise SettingsError(
            f"policy: {preset!r} is not known{hint(preset, known)}; there are {', '.join(known)}"
        )
    parts = re.split(r",(?=[\w-]+\.\w+=)", settings) if settings else []
    return Policy(name=preset, preset=found).having(dict(_setting(part) for part in parts))


def _setting(text: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    if not equals or "." not in key:
        raise SettingsError(f"policy: {text!r}: write settings as plugin.parameter=value")
    return key, parsed(value, f"policy: {text!r}")


def parsed(value: str, where: str) -> object:
    """A value as JSON has it (``1e-6`` is text in YAML), or else YAML."""
    found: object
    try:
        found = msgspec.json.decode(value)
    except msgspec.DecodeError:
        try:
            found = yaml.safe_load(value)
        except yaml.YAMLError as exc:
            raise SettingsError(f"{where}: the value is not YAML") from exc
    return found
