"""What is compared: a policy is a named preset, perhaps with parameters, or a picker configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from pointsman.config import read_text
from pointsman.errors import SettingsError
from pointsman.registry import hint
from pointsman.scheduling.picker_config import LoadedConfig
from pointsman.scheduling.presets import DEFAULT, PRESETS, load_policy

ALIASES: Mapping[str, str] = {"default": DEFAULT, "k8s-random": "random"}
"""Names that say what a policy stands for here; Kubernetes' own balancing is as good as random."""


FILES = (".yaml", ".yml", ".json")


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """How an endpoint is chosen, and what tables call it."""

    name: str
    preset: str = DEFAULT
    picker_config: str | None = None
    """Text of an EndpointPickerConfig; takes the preset's place."""

    def load(self) -> LoadedConfig:
        """Fresh plugins: what one run has learned is not for the next."""
        return load_policy(self.preset, picker_config=self.picker_config)


def policy(name: str) -> Policy:
    """The preset of that name, or the EndpointPickerConfig in a file; ``SettingsError`` if there is none."""
    path = Path(name)
    if path.suffix in FILES:
        return Policy(name=path.stem, picker_config=read_text(path))
    preset = ALIASES.get(name, name)
    if preset not in PRESETS:
        known = (*ALIASES, *PRESETS)
        raise SettingsError(f"policy: {name!r} is not known{hint(name, known)}; there are {', '.join(known)}")
    return Policy(name=name, preset=preset)
