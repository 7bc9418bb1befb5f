"""Small tokenizers of every kind, trained on the standard library's sources."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

from pointsman.tokens.cuts import WORDS, Cuts
from pointsman.tokens.library import plain, quick

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|end_of_text|>"]
SOURCES = [str(path) for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-d]*.py"))[:40]]
VOCABULARY = 1500


def bytes_bpe(*splits: str, normalizer: object = None, prefix_space: bool = False) -> Tokenizer:
    """Byte-level BPE, its words by the given patterns or GPT-2's own."""
    made = Tokenizer(models.BPE())
    levels = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in splits]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=not splits)
    made.pre_tokenizer = pre_tokenizers.Sequence([*levels, byte_level]) if splits else byte_level
    if normalizer is not None:
        made.normalizer = normalizer
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made.train(SOURCES, trainer)
    return made


def bars_bpe() -> Tokenizer:
    """BPE as SentencePiece trains it: bars for blanks, no token of more than a word."""
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, show_progress=False)
    made.train(SOURCES, trainer)
    return made


def metaspace(scheme: str, split: bool) -> Tokenizer:
    made = bars_bpe()
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    return made


def llama2() -> Tokenizer:
    """With the normalizer that puts a bar before every part."""
    made = bars_bpe()
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.pre_tokenizer = None  # type: ignore[assignment]
    return made


def gemma() -> Tokenizer:
    made = bars_bpe()
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    return made


def unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        vocab_size=600, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    made.train(SOURCES[:6], trainer)
    return made


def wordpiece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.train(
        SOURCES, trainers.WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, show_progress=False)
    )
    return made


def with_odd_tokens() -> Tokenizer:
    """Added tokens that take in blanks, are looked for in normalized text, or overlap another."""
    made = bytes_bpe(WORDS["Qwen"], normalizer=normalizers.NFC())
    made.add_special_tokens(
        [
            AddedToken("<mask>", lstrip=True, normalized=False),
            AddedToken("<tail>", rstrip=True, normalized=False),
            AddedToken("def", normalized=True),
            AddedToken("<a><b>", normalized=False),
            AddedToken("<b><c>", normalized=False),
        ]
    )
    return made


def with_whole_words() -> Tokenizer:
    made = bytes_bpe(WORDS["Llama 3"])
    made.add_special_tokens([AddedToken("return", single_word=True, normalized=False)])
    return made


def with_added_text() -> Tokenizer:
    """An added token that reaches over a blank between words."""
    made = bytes_bpe()
    made.add_tokens(["is the"])
    return made


def unlisted() -> Tokenizer:
    """A pattern nobody has heard of, which joins words."""
    return bytes_bpe(r"\w+ \w+|\s+|\S")


KINDS: dict[str, tuple[Callable[[], Tokenizer], bool]] = {
    "gpt2": (bytes_bpe, True),
    "prefix-space": (lambda: bytes_bpe(prefix_space=True), True),
    "llama3": (lambda: bytes_bpe(WORDS["Llama 3"]), True),
    "qwen": (lambda: bytes_bpe(WORDS["Qwen"], normalizer=normalizers.NFC()), True),
    "qwen3.5": (lambda: bytes_bpe(WORDS["Qwen 3.5"], normalizer=normalizers.NFC()), True),
    "o200k": (lambda: bytes_bpe(WORDS["o200k"]), True),
    "tekken": (lambda: bytes_bpe(WORDS["Tekken"]), True),
    "deepseek": (
        lambda: bytes_bpe(r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", WORDS["DeepSeek"]),
        True,
    ),
    "metaspace-always": (lambda: metaspace("always", True), True),
    "metaspace-first": (lambda: metaspace("first", True), True),
    "metaspace-never": (lambda: metaspace("never", True), True),
    "mistral": (lambda: metaspace("first", False), True),
    "llama2": (llama2, False),
    "gemma": (gemma, True),
    "unigram": (unigram, True),
    "wordpiece": (wordpiece, True),
    "odd-tokens": (with_odd_tokens, True),
    "whole-words": (with_whole_words, False),
    "added-text": (with_added_text, False),
    "unlisted": (unlisted, False),
}
"""How to make each, and whether it can be cut between words."""


def special_around(made: Tokenizer) -> Tokenizer:
    """The same with a beginning and an end of text."""
    ids = [(name, made.token_to_id(name)) for name in ("<s>", "</s>")]
    made.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    return made


class Kind:
    """A tokenizer of one kind."""

    def __init__(self, library: Tokenizer, between_words: bool) -> None:
        self.library = library
        self.between_words = between_words
        """Whether it can be cut there."""
        self.cuts = Cuts(library.to_str())
        self.ways = [way for way in (plain(library), quick(library)) if way]
        """To tokenise a whole text."""


@pytest.fixture(scope="session", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    make, between_words = KINDS[request.param]
    return Kind(special_around(make()), between_words)


CHATML = (
    "{% if tools %}<|im_start|>tools {{ tools | tojson }}<|im_end|>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %} {{ call.function.name }}({{ call.function.arguments | tojson }})"
    "{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def qwen() -> Tokenizer:
    return special_around(KINDS["qwen"][0]())


@pytest.fixture
def folder(tmp_path: Path, qwen: Tokenizer) -> Path:
    """A model's tokenizer and chat template as its engine has them."""
    made = tmp_path / "model"
    made.mkdir()
    qwen.save(str(made / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": CHATML}
    (made / "tokenizer_config.json").write_text(json.dumps(config))
    return made
