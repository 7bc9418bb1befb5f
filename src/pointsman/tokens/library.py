"""What turns a text into ids: the tokenizers library, or fastokens where that is installed, takes the
tokenizer, and gives exactly the same for some hundred awkward texts.
"""

from __future__ import annotations

import logging
import os
import random
import struct
from collections.abc import Iterator, Sequence
from importlib import import_module
from itertools import pairwise

from tokenizers import Tokenizer as Library

from pointsman.api.token_ids import pack
from pointsman.tokens.tokenizer import Encode

log = logging.getLogger(__name__)

# Its own threads come late now and then, by milliseconds; ours do as much.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def fastest(library: Library) -> Encode:
    """Without padding and truncation."""
    library.no_padding()
    library.no_truncation()
    return quick(library) or plain(library)


def plain(library: Library) -> Encode:
    """By the tokenizers library: of its calls only those for batches let other threads go on."""
    encode = library.encode_batch_fast

    def ids(texts: Sequence[str], add_special: bool) -> list[bytes]:
        return [pack(found.ids) for found in encode(list(texts), add_special_tokens=add_special)]

    return ids


def quick(library: Library) -> Encode | None:
    """By fastokens; None where it is absent or differs. Texts that it fails at go to the other library."""
    try:
        made = import_module("fastokens").Tokenizer.from_json_str(library.to_str())
    except ImportError:
        return None
    except Exception as exc:  # whatever the library does not know
        log.info("fastokens does not take this tokenizer: %s", exc)
        return None
    encode, otherwise = made.encode_batch_flat, plain(library)

    def ids(texts: Sequence[str], add_special: bool) -> list[bytes]:
        try:
            packed, counts = encode(list(texts), add_special_tokens=add_special)
        except Exception:  # its patterns have limits that the other's have not
            return otherwise(texts, add_special)
        ends = [4 * count for (count,) in struct.iter_unpack("<Q", counts)]
        return [packed[start:end] for start, end in pairwise(ends)]

    texts = list(awkward(library))
    for add_special in (False, True):
        if ids(texts, add_special) != otherwise(texts, add_special):
            log.warning("fastokens makes other tokens than the model's tokenizer: it is left alone")
            return None
    return ids


_WORDS = (
    *("the", " and", " Foo", " BAR", "It's", "WE'LL", "don't", "'re", "na\u00efve", "e\u0301", "\ufb01"),
    *(" ", "  ", "   ", "\n", "\r\n", "\t", " \n ", "\n\n", "\u3000", "\u00a0", "\u2581"),
    *("_", "-", ".", "'", "<", ">", "1", "2024", "123456", "3.14", "\u00df", "\u0130", "\u0301"),
    *("中文", "ひらがな", "한국어", "العربية", "हिन्दी", "👩\u200d🚀"),
)  # fmt: skip
TEXTS = 300


def awkward(library: Library) -> Iterator[str]:
    """Words, blanks, scripts and the tokenizer's own added tokens in every neighbourhood; always the same."""
    rng = random.Random(7)
    added = [token.content for token in library.get_added_tokens_decoder().values()]
    some = [*_WORDS, *rng.sample(added, min(len(added), 20))]
    for _ in range(TEXTS):
        count = rng.randrange(1, 24)
        odd = [chr(rng.randrange(32, 0x2FFF)), chr(rng.randrange(0x10000, 0x1FFFF))]
        yield "".join(rng.choices([*some, *odd], k=count))
    yield "a" * 20_000
    yield " " * 20_000
