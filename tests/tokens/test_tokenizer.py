"""Texts in pieces have the tokens of the whole, whatever the tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import models

from pointsman.api.token_ids import pack
from pointsman.tokens.cuts import Cuts
from pointsman.tokens.library import plain
from pointsman.tokens.memory import Memory
from pointsman.tokens.tokenizer import Tokenizer

FRAGMENTS = [
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|end_of_text|>", "<mask>", "<tail>", "<a><b><c>", "><"),
    *("the", "def", "return", "is the", " import", "class Foo", "It's", "WE'LL", "don't", "x's", "'s", "'re"),
    *(
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        " \n ",
        "\n\n",
        "\u3000",
        "\u00a0",
        "▁",
        "▁▁",
        "_",
        "-",
        ".",
        "'",
        "<",
        ">",
    ),
    *(
        "1",
        "2024",
        "123456",
        "3.14",
        "é",
        "e\u0301",
        "ﬁ",
        "Ä",
        "ß",
        "\u017f",
        "中文",
        "ひら",
        "한국",
        "👩‍🚀",
        "\u0301",
        "İ",
        "µ",
    ),
]
words = st.sampled_from(["foo", "bar", "Bar", "BAZ", "a", "self", "value"]).map(lambda word: " " + word)
texts = st.lists(st.sampled_from(FRAGMENTS) | words | st.text(max_size=6), max_size=14).map("".join)
often = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def truth(kind: Any, text: str, *, add_special: bool) -> bytes:
    return pack(kind.library.encode(text, add_special_tokens=add_special).ids)


@often
@given(text=texts)
def test_pieces_have_the_tokens_of_the_whole(kind: Any, text: str) -> None:
    for whole in kind.ways:
        tokenizer = Tokenizer(whole, kind.cuts, Memory(1 << 20), 1, 1)
        for add_special in (False, True):
            found = tokenizer.encode(text, add_special=add_special)
            assert found == truth(kind, text, add_special=add_special)
        assert tokenizer.plan(text).missing_chars == 0


@often
@given(text=texts, more=texts, least=st.integers(1, 12))
def test_a_text_that_goes_on_has_the_same_pieces(kind: Any, text: str, more: str, least: int) -> None:
    pieces, longer = (kind.cuts.pieces(t, least, 2 * least) for t in (text, text + more))
    assert "".join(longer) == text + more
    assert all(len(piece) >= least for piece in longer[:-1])
    assert longer[: len(pieces) - 1] == pieces[:-1]


def test_what_is_cut_between_words(kind: Any) -> None:
    assert kind.cuts.between_words == kind.between_words
    assert len(kind.cuts.pieces("one and two and three", 1, 1)) == (5 if kind.between_words else 1)


def test_every_kind_is_cut_before_special_tokens(kind: Any) -> None:
    pieces = kind.cuts.pieces("<s>.<|im_start|>.<|im_end|>.</s>", 1, 9)
    assert pieces == ["<s>.", "<|im_start|>.", "<|im_end|>.", "</s>"]


def test_sources_in_pieces_have_the_tokens_of_the_whole(kind: Any) -> None:
    text = "<|im_start|>".join(Path(name).read_text()[:6000] for name in (__file__, st.__file__))
    for whole in kind.ways:
        tokenizer = Tokenizer(whole, kind.cuts, Memory(1 << 20), 16, 64)
        assert tokenizer.encode(text, add_special=True) == truth(kind, text, add_special=True)


def test_a_next_turn_leaves_little_to_do(kind: Any) -> None:
    if not kind.between_words:
        pytest.skip("its words belong together")
    tokenizer = Tokenizer(kind.ways[0], kind.cuts, Memory(1 << 20), 16, 64)
    history = "<|im_start|>user " + "to be or not to be that is the question " * 50
    assert tokenizer.plan(history).missing_chars == len(history)
    tokenizer.encode(history, add_special=False)
    assert tokenizer.plan(history).missing_chars == 0
    assert tokenizer.plan(history + "whether nobler in the mind").missing_chars < 200


def test_two_tokenizers_do_not_share_pieces() -> None:
    memory = Memory(1 << 20)
    first, second = (
        Tokenizer(plain(library), Cuts(library.to_str()), memory)
        for library in (Library(models.BPE({a: 0, b: 1}, [])) for a, b in ("ab", "ba"))
    )
    assert first.encode("ab", add_special=False) != second.encode("ab", add_special=False)
