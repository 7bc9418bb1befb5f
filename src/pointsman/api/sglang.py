"""SGLang's native ``/generate``."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from msgspec import Raw

from pointsman.api import media
from pointsman.api.body import Body, Count, Facts, json_parser
from pointsman.api.format import Format, register
from pointsman.api.prompts import ABSENT, prompts, root, tokens
from pointsman.api.usage import sglang_usage


class _Sampling(msgspec.Struct, gc=False):
    max_new_tokens: Count | None = None
    n: Count | None = None


class _Generate(Body):
    text: Raw = ABSENT
    input_ids: Raw = ABSENT
    sampling_params: _Sampling | list[_Sampling] | None = None
    image_data: Raw = ABSENT
    video_data: Raw = ABSENT
    audio_data: Raw = ABSENT
    lora_path: Raw = ABSENT


def _generate(body: _Generate, headers: Mapping[str, str]) -> Facts:
    """Media are beside the text, which has placeholders for them, so their hashes are in the root."""
    batch = prompts(body.input_ids) or prompts(body.text)
    given = body.sampling_params
    sampling = given if isinstance(given, _Sampling) else given[0] if given else _Sampling()
    found = (
        *media.listed("image", body.image_data, headers),
        *media.listed("video", body.video_data, headers),
        *media.listed("audio", body.audio_data, headers),
    )
    names = Raw(" ".join(digest for digest, _ in found).encode()) if found else ABSENT
    count = tokens(batch) + sum(weight for _, weight in found)
    return Facts(
        batch, count, root(body.lora_path, names), sampling.max_new_tokens, sampling.n or 1, media=found
    )


register(
    Format(
        "sglang",
        ("/generate",),
        json_parser("sglang", _Generate, _generate, needs_model=False),
        usage=sglang_usage,
        exact=True,
    )
)
