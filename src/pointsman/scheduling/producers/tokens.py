"""token-producer: how long a prompt is, and who is asked for its tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import msgspec

from pointsman.registry import Plugin, register
from pointsman.scheduling.durations import seconds

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


class Vllm(msgspec.Struct, rename="camel", forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """The server that renders prompts."""

    url: str = ""
    timeout: str = ""
    mm_timeout: str = ""

    def __post_init__(self) -> None:
        self.timeout_s()
        if self.mm_timeout:
            seconds(self.mm_timeout)

    def timeout_s(self) -> float | None:
        """How long a request waits for its token ids; None where that was not given."""
        return seconds(self.timeout) if self.timeout else None


@register("token-producer", "tokenizer")
class TokenProducer(Plugin):
    """Prompt lengths by estimate: four bytes a token, until engines tell of the model's prompts how long they
    are. Token ids, where precise prefix routing wants them, come from ``vllm.url`` (the setting tokens.url),
    without it from the endpoints themselves; a request waits ``vllm.timeout`` for them (tokens.budget_s).
    """

    backend: Literal["", "estimate", "vllm"] = ""
    estimate: Mapping[str, Any] = {}
    model_name: str = ""
    vllm: Vllm | None = None
    uds_tokenizer_config: Mapping[str, Any] | None = None

    outdated: ClassVar[Mapping[str, str]] = {
        "uds_tokenizer_config": "has no effect: engines are asked for token ids, or see tokens.models"
    }
    unused: ClassVar[Mapping[str, str]] = {
        "modelName": "a prompt is tokenised for the model that its request names",
        "vllm.mmTimeout": "media have the same time as text",
    }

    def __post_init__(self) -> None:
        _check(self.estimate, ESTIMATE, "estimate")
