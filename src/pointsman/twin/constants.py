"""Engine constants in a file: what ``calibrate`` writes and the case study and fleets read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

import msgspec
import yaml

from pointsman.config import convert, read_yaml
from pointsman.sim.profiles import EngineParameters
from pointsman.twin.replay import Constants

REFITTED = "refitted"
_WRITES = "`pointsman calibrate` writes such a file"


class ConstantsFile(msgspec.Struct, forbid_unknown_fields=True):
    """``constants``: accelerator, then model, then what a fleet file's ``measured`` wants."""

    constants: Mapping[str, Mapping[str, EngineParameters]]


def load_constants(path: str | os.PathLike[str]) -> Constants:
    """The constants in a YAML file, or ``refitted``: what ``calibrate`` finds on the study's own runs;
    ``SettingsError`` naming the key that is wrong.
    """
    if path == REFITTED:
        with resources.as_file(resources.files("pointsman.twin").joinpath("data/refitted.yaml")) as own:
            return load_constants(own)
    file = convert(read_yaml(Path(path)), ConstantsFile, os.fspath(path), lists=_WRITES)
    return {
        (accelerator, model): parameters
        for accelerator, models in file.constants.items()
        for model, parameters in models.items()
    }


def dump_constants(constants: Constants) -> str:
    """The same as text."""
    tree: dict[str, dict[str, dict[str, object]]] = {}
    for (accelerator, model), parameters in constants.items():
        tree.setdefault(accelerator, {})[model] = msgspec.to_builtins(parameters)
    return yaml.safe_dump({"constants": tree}, sort_keys=False)
