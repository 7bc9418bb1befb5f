"""inflight-load-producer: the pool counts what is in flight; this only checks what is asked of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from msgspec import Meta

from pointsman.registry import Plugin, register


@register("inflight-load-producer")
class InflightLoad(Plugin):
    """Requests and uncached prompt tokens in flight, as the pool counts them. ``outputRatio`` and
    ``maxEstimatedOutputTokens`` matter only with ``addEstimatedOutputTokens``, which does not exist yet."""

    prefix_match_info_producer_name: str = ""
    add_estimated_output_tokens: bool = False
    output_ratio: Annotated[float, Meta(ge=0)] = 1.5
    max_estimated_output_tokens: Annotated[int, Meta(ge=0)] | None = None

    unused: ClassVar[Mapping[str, str]] = {
        "prefixMatchInfoProducerName": "what is cached is what the decision goes by"
    }

    def __post_init__(self) -> None:
        if self.add_estimated_output_tokens:
            raise ValueError("addEstimatedOutputTokens: true is not available in this version")
