"""Where a text may be cut so that its pieces, tokenised one by one, give the tokens of the whole.

Two kinds of places are certain, whatever stands around them:

- Before an added token that is looked for in the raw text (``normalized: false``, as special tokens are),
since a tokenizer takes a text apart at those first and goes on with each part alone. Excluded are tokens
that can overlap another, and those that take in white space around them. - Between an ASCII letter and a
blank that another ASCII letter follows, with the normalizers and pre-tokenizers listed here: none of them
joins or tells apart anything across it. Every pattern listed begins a new match at such a blank, none looks
behind, and none looks further ahead than past white space.

What is not listed is not cut there. So a new kind of tokenizer is slower, never wrong.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from string import ascii_letters
from typing import Any

Node = Mapping[str, Any]
"""Part of a tokenizer.json."""

BETWEEN_WORDS = r"(?<=[A-Za-z])(?= [A-Za-z])"
_NEVER = re.compile(r"(?!)")

_S = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_OTHERS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_HEAD = r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_UPPER_LOWER, _ALL_UPPER = f"{_HEAD}{_UPPER}*{_LOWER}+", f"{_HEAD}{_UPPER}+{_LOWER}*"
_PATHS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_SIGNS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
WORDS = {
    "GPT-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "Llama 3": rf"{_S}|{_LETTERS}|\p{{N}}{{1,3}}|{_OTHERS}|{_REST}",
    "Qwen": rf"{_S}|{_LETTERS}|\p{{N}}|{_OTHERS}|{_REST}",
    "Qwen 3.5": rf"{_S}|{_HEAD}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_REST}",
    "o200k": rf"{_UPPER_LOWER}{_S}?|{_ALL_UPPER}{_S}?|\p{{N}}{{1,3}}|{_PATHS}|{_REST}",
    "Tekken": rf"{_UPPER_LOWER}|{_ALL_UPPER}|\p{{N}}|{_PATHS}|{_REST}",
    "DeepSeek": (
        rf"{_SIGNS}|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_REST}"
    ).replace('\\"', '"'),
}
"""Patterns of ``Split`` that begin a match at every blank between two words."""
_NEITHER = frozenset((r"\p{N}{1,3}", r"\p{N}", "[0-9]", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"))
"""Patterns that match neither letters of ours nor blanks."""
_PATTERNS = _NEITHER | frozenset(WORDS.values())

_NORMALIZERS = frozenset(("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "BertNormalizer", "StripAccents"))
_PRE_TOKENIZERS = frozenset(("BertPreTokenizer", "Whitespace", "WhitespaceSplit", "Punctuation", "Digits"))
_MODELS = frozenset(("BPE", "WordPiece", "WordLevel", "Unigram"))


class Cuts:
    """The certain places of one tokenizer; ``text`` is its tokenizer.json."""

    def __init__(self, text: str) -> None:
        tree = json.loads(text)
        added = [t for t in tree.get("added_tokens") or () if t["content"]]
        special = sorted(map(re.escape, _plain(added)), key=len, reverse=True)
        self.between_words = _splits_words(tree) and not any(map(_joins_words, added))
        self._special = re.compile("|".join(special)) if special else _NEVER
        self._words = re.compile(BETWEEN_WORDS) if self.between_words else _NEVER

    def pieces(self, text: str, least_chars: int, least_words_chars: int) -> list[str]:
        """The text in pieces of at least so many characters, but for the last: those before a special token,
        which is where conversations go on, and those between words. A text that goes on has the same pieces
        as the shorter one, but for the last of that.
        """
        found: list[str] = []
        special, words, start = self._special.search, self._words.search, 0
        while True:
            word = words(text, start + least_words_chars)
            end = word.start() if word else len(text)
            token = special(text, start + least_chars, end)
            if token is not None:
                end = token.start()
            found.append(text[start:end])
            if token is None and word is None:
                return found
            start = end


def _plain(added: Iterable[Node]) -> list[str]:
    """Contents of added tokens that are found in raw text wherever they stand."""
    raw = [token for token in added if not token["normalized"]]
    some_are_words = any(token["single_word"] for token in raw)
    contents = [token["content"] for token in raw]
    heads = {text[:end] for text in contents for end in range(1, len(text))}
    tails = {text[at:] for text in contents for at in range(1, len(text))}
    whole = "\0".join(contents)
    found = []
    for token in raw:
        text = token["content"]
        takes_more = token["lstrip"] or token["rstrip"] or token["single_word"]
        may_be_part_of_a_word = some_are_words and (_wordy(text[0]) or _wordy(text[-1]))
        overlaps = any(text[at:] in heads for at in range(1, len(text))) or any(
            text[:end] in tails for end in range(1, len(text))
        )
        if not (takes_more or may_be_part_of_a_word or overlaps or whole.count(text) > 1):
            found.append(text)
    return found


def _wordy(char: str) -> bool:
    return char.isalnum() or char == "_" or not char.isascii()


_WORDS = re.compile(r"[A-Za-z] ")


def _joins_words(token: Node) -> bool:
    """Whether an added token could reach over a place between words."""
    text = token["content"]
    takes_blanks = token["rstrip"] and text[-1].isalpha()
    return bool(token["single_word"] or takes_blanks or _WORDS.search(text))


def _splits_words(tree: Node) -> bool:
    """Whether texts always come apart between words."""
    kind = tree["model"].get("type")
    normalizers = list(_flat(tree.get("normalizer"), "normalizers"))
    if kind not in _MODELS or not all(map(_leaves_blanks, normalizers)):
        return False
    steps = list(_flat(tree.get("pre_tokenizer"), "pretokenizers"))
    bars = _BLANKS_AS_BARS in normalizers
    if bars:
        steps = [step for step in steps if step.get("pattern") != {"String": " "}]  # there are none left
    if len(steps) == 1 and steps[0]["type"] == "Metaspace" and not steps[0].get("split", True):
        bars, steps = steps[0]["replacement"] == _BAR, []
    if not steps:
        return bars and kind == "BPE" and _merges_no_words(tree["model"]["vocab"])
    return all(map(_minds_blanks, steps)) and any(map(_begins_at_blanks, steps))


def _flat(node: Node | None, inner: str) -> Iterable[Node]:
    if node is None:
        return
    if node["type"] != "Sequence":
        yield node
        return
    for child in node[inner]:
        yield from _flat(child, inner)


_BAR = "\u2581"
_BLANKS_AS_BARS = {"type": "Replace", "pattern": {"String": " "}, "content": _BAR}


def _leaves_blanks(normalizer: Node) -> bool:
    """It changes characters one by one, or as they combine; a blank and the letters around it stay apart."""
    return normalizer["type"] in _NORMALIZERS or normalizer == _BLANKS_AS_BARS


def _minds_blanks(step: Node) -> bool:
    """It is known here, and joins nothing to a blank but what follows it."""
    kind = step["type"]
    if kind == "Split":
        known = step["pattern"].get("Regex") in _PATTERNS
        return known and step["behavior"] == "Isolated" and not step["invert"]
    if kind == "Metaspace":
        return bool(step.get("split", True)) and step["replacement"] == _BAR
    return kind == "ByteLevel" or kind in _PRE_TOKENIZERS


def _begins_at_blanks(step: Node) -> bool:
    kind = step["type"]
    if kind == "Split":
        return step["pattern"]["Regex"] not in _NEITHER
    if kind == "ByteLevel":
        return bool(step.get("use_regex", True))
    return kind in ("Metaspace", "BertPreTokenizer", "Whitespace", "WhitespaceSplit")


_INSIDE = re.compile(f"[^{_BAR}]{_BAR}")


def _merges_no_words(vocabulary: Mapping[str, int]) -> bool:
    """Of BPE over a whole text: no token reaches from a word into the blank behind it, and none of the two is
    unknown, since unknown neighbours may become one.
    """
    known = all(char in vocabulary for char in (_BAR, *ascii_letters))
    return known and not any(map(_INSIDE.search, vocabulary))
