"""token-producer: how long a prompt is. Only llm-d's ``estimate`` backend, four bytes a token, exists yet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pointsman.registry import Plugin, register

ESTIMATE: Mapping[str, Any] = {
    "image": {
        "mode": "dynamic",
        "defaultResolution": {"width": 640, "height": 360},
        "dynamic": {"factor": 1024},
    },
    "video": {
        "tokensPerFrame": {"mode": "dynamic", "dynamic": {"factor": 1024}},
        "frames": {
            "mode": "sampled",
            "sampled": {"sampleFPS": 1},
            "strided": {"defaultSourceFPS": 24, "frameStride": 1},
        },
        "defaultResolution": {"width": 640, "height": 360},
        "defaultDuration": 10,
    },
}
"""llm-d's defaults (facts 3.5), which are the only values there are yet."""


def _check(given: Mapping[str, Any], defaults: Mapping[str, Any], path: str) -> None:
    for key, value in given.items():
        name = f"{path}.{key}"
        if key not in defaults:
            raise ValueError(f"{name}: there is no such parameter in this version")
        default = defaults[key]
        if isinstance(default, Mapping) and isinstance(value, Mapping):
            _check(value, default, name)
        elif value != default:
            raise ValueError(f"{name}: values other than {default!r} are not available in this version")


@register("token-producer", "tokenizer")
class TokenProducer(Plugin):
    """Prompt lengths by estimate: four bytes a token, until engines tell of the model's prompts how long they
    are. The ``vllm`` backend is not available yet.
    """

    estimate: Mapping[str, Any] = {}
    model_name: str = ""
    vllm: Mapping[str, Any] | None = None
    uds_tokenizer_config: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        wanted = {
            "modelName": self.model_name,
            "vllm": self.vllm is not None,
            "udsTokenizerConfig": self.uds_tokenizer_config is not None,
        }
        for name, given in wanted.items():
            if given:
                raise ValueError(f"{name}: only the estimate backend is available in this version")
        _check(self.estimate, ESTIMATE, "estimate")
