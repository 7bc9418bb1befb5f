"""Of two libraries the quicker one, as long as they give the same."""

from __future__ import annotations

import struct
import sys
import types
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Library

from pointsman.api.token_ids import pack
from pointsman.tokens.library import awkward, fastest, plain, quick


def test_the_texts_that_libraries_are_compared_by_are_awkward(qwen: Library) -> None:
    texts = list(awkward(qwen))
    assert texts == list(awkward(qwen))
    everything = "".join(texts)
    for odd in ("<|im_start|>", "\n\n", "\u0301", "don't", "123456", "中文"):
        assert odd in everything


def test_fastokens_takes_the_usual_tokenizers(qwen: Library) -> None:
    pytest.importorskip("fastokens")
    encode = quick(qwen)
    assert encode is not None
    texts = [Path(__file__).read_text(), "", "<s>", "Hello"]
    for add_special in (False, True):
        expected = [pack(qwen.encode(text, add_special_tokens=add_special).ids) for text in texts]
        assert encode(texts, add_special) == plain(qwen)(texts, add_special) == expected


class Other:
    """A library in the place of fastokens, wrong about ``wrong`` and failing at ``fails``."""

    wrong = "\0"
    fails = "\0"

    def __init__(self, library: Library) -> None:
        self._encode = plain(library)

    @classmethod
    def from_json_str(cls, text: str) -> Other:
        return cls(Library.from_str(text))

    def encode_batch_flat(self, texts: list[str], add_special_tokens: bool) -> tuple[bytes, bytes]:
        if any(self.fails in text for text in texts):
            raise ValueError(texts)
        found = self._encode(texts, add_special_tokens)
        found = [ids[4:] if self.wrong in text else ids for ids, text in zip(found, texts, strict=True)]
        ends = accumulate((len(ids) // 4 for ids in found), initial=0)
        return b"".join(found), struct.pack(f"<{len(texts) + 1}Q", *ends)


def installed(monkeypatch: pytest.MonkeyPatch, **fields: Any) -> None:
    module = types.SimpleNamespace(Tokenizer=type("Odd", (Other,), fields))
    monkeypatch.setitem(sys.modules, "fastokens", module)  # type: ignore[arg-type]


def test_one_that_is_wrong_once_is_left_alone(
    qwen: Library, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    installed(monkeypatch)
    assert quick(qwen) is not None
    installed(monkeypatch, wrong="<|im_end|>")
    assert quick(qwen) is None
    assert "left alone" in caplog.text
    assert fastest(qwen)(["Hello"], False) == [pack(qwen.encode("Hello", add_special_tokens=False).ids)]


def test_a_text_that_it_fails_at_goes_to_the_other(qwen: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, fails="limit")
    encode = quick(qwen)
    assert encode is not None
    assert encode(["a limit"], False) == [pack(qwen.encode("a limit", add_special_tokens=False).ids)]


def test_without_it(qwen: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastokens", None)  # type: ignore[arg-type]
    assert quick(qwen) is None
    assert fastest(qwen)(["Hello"], True) == [pack(qwen.encode("Hello").ids)]


def test_padding_and_truncation_of_the_file_do_not_count(qwen: Library) -> None:
    cut = Library.from_str(qwen.to_str())
    cut.enable_truncation(3)
    cut.enable_padding(length=40)
    assert fastest(cut)(["Hello there, you"], True) == [pack(qwen.encode("Hello there, you").ids)]
