"""Prompt text of a wanted length in tokens.

A token is a space and a common English word of three letters: four bytes, so the count is exact under the
4-bytes-a-token estimate of ``pointsman engine`` and of routers without a tokenizer. Byte-pair tokenizers
with a vocabulary of 32K or more hold nearly all of these words as one token each, so real engines count
about the same; what they do count is in their ``usage``, and the report goes by that.
"""

from __future__ import annotations

import random

_WORDS = (
    "the and for are but not you all any can had her was one our out day get has him his how man new now "
    "old see two way who boy did its let put say she too use dad mom act add age ago aid aim air arm art "
    "ask bad bag bar bed bet big bit box bus buy car cat cup cut dog dry due ear eat egg end eye far fat "
    "few fit fix fly fun gas got gum guy hat hit hot ice ill job joy key kid lab law lay led leg lie lot "
    "low map may met mix mud net nor odd off oil pay per pet pin pop pot pro raw red rid row run sad sat "
    "sea set shy sir sit six sky son sum sun tap tax tea ten tie tip ton top toy try van via war wet why "
    "win won yes yet zip bay bee cab cap cow cry den dig dot ego era fan fee fog fox gap hen hip hub inn "
    "ion jam jar jet jog kit lap lid lip log mad mat mob nut oak pad pan pea pen pie pig pit pub rat ray "
    "rib rob rod rot rub rug sap saw ski sob spy tag tan tar toe tub tug vet wax web wig wit zoo ace ash "
    "axe bow"
)
_LETTERS = [bytes(ord(word[i]) for word in (_WORDS.split() * 2)[:256]) for i in range(3)]
"""First, second and third letter of the word that each byte stands for."""


def text(rng: random.Random, tokens: int) -> str:
    """``tokens`` tokens of text, four bytes each."""
    drawn = rng.randbytes(tokens)
    made = bytearray(b" ") * (4 * tokens)
    for i, letters in enumerate(_LETTERS, 1):  # column by column: about 5 ns a token
        made[i::4] = drawn.translate(letters)
    return made.decode("ascii")
