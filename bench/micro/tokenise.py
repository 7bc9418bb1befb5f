"""Microseconds until the token ids of a prompt are known: as a whole, and as the next turn of a
conversation.

The tokenizer is a byte-level BPE with Llama 3's pattern, of 32,000 tokens, trained on the standard
library's sources (some 10 s, not measured). The chat template is ChatML.

Whole: rendered and tokenised without remembering anything. Turn: what the conversation before left in
memory is used. Again: the same prompt once more.

python bench/micro/tokenise.py
"""

from __future__ import annotations

import json
import random
import sysconfig
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tokenizers import Regex, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

from pointsman import api
from pointsman.tokens.asked import Chat, Texts, asked
from pointsman.tokens.cuts import WORDS, Cuts
from pointsman.tokens.folder import Model
from pointsman.tokens.library import plain, quick
from pointsman.tokens.memory import Memory
from pointsman.tokens.template import ChatTemplate
from pointsman.tokens.tokenizer import Encode, Tokenizer

ROUNDS = 30
SPECIAL = ["<|im_start|>", "<|im_end|>", *(f"<|reserved_{i}|>" for i in range(250))]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SOURCES = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))


def trained() -> Library:
    made = Library(models.BPE())
    pattern = pre_tokenizers.Split(Regex(WORDS["Llama 3"]), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([pattern, pre_tokenizers.ByteLevel(False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=32_000, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made.train([str(path) for path in SOURCES[:150]], trainer)
    return made


def prose(rng: random.Random, library: Library, tokens: int) -> str:
    """Lines of sources that the tokenizer was not trained on, so many tokens of them."""
    lines = [line for path in SOURCES[150:] for line in path.read_text(errors="replace").splitlines()]
    rng.shuffle(lines)
    text, count = [], 0
    while count < tokens:
        text.append(lines.pop())
        count += len(library.encode(text[-1] + "\n").ids)
    return "\n".join(text)


def body(path: str, **fields: object) -> Texts | Chat:
    request = api.find(path).parse("r", path, {}, json.dumps({"model": "m", **fields}).encode())
    found = asked(request)
    assert not isinstance(found, tuple)
    return found


def median_us(call: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
    spent = []
    for _ in range(ROUNDS):
        before()
        start = time.perf_counter_ns()
        call()
        spent.append(time.perf_counter_ns() - start)
    spent.sort()
    return spent[ROUNDS // 2] / 1000


def ids_of(model: Model, wanted: Texts | Chat) -> list[bytes]:
    finish = model.tokenizer.finish
    return [finish(plan, add_special=wanted.add_special) for plan in model.plans(wanted)]


def whole_us(whole: Encode, text: str, add_special: bool) -> float:
    """With the lines in another order each time: libraries may remember more than words."""
    rng, lines, varied = random.Random(2), text.splitlines(keepends=True), [text]

    def another() -> None:
        rng.shuffle(lines)
        varied[0] = "".join(lines)

    return median_us(lambda: whole(varied, add_special), another)


Templates = dict[str, ChatTemplate]


def compare(name: str, library: Library, templates: Templates, one: Texts | Chat, two: Texts | Chat) -> None:
    """``two`` is ``one`` and its next turn; by each library."""
    cuts = Cuts(library.to_str())
    for way in ("tokenizers", "fastokens"):
        # Both libraries remember words, and have seen all of these: as in life.
        whole = plain(library) if way == "tokenizers" else quick(library)
        assert whole is not None, "fastokens is not installed"
        model = Model(Tokenizer(whole, cuts, Memory(1 << 26)), templates)
        state = {"model": model}

        def had_one_before(whole: Encode = whole, state: dict[str, Model] = state) -> None:
            state["model"] = Model(Tokenizer(whole, cuts, Memory(1 << 26)), templates)
            ids_of(state["model"], one)

        (text,) = model.texts(two)
        had_one_before()
        assert ids_of(state["model"], two) == plain(library)([text], two.add_special)
        tokens = len(library.encode(text).ids)
        rendering = median_us(lambda model=model: model.texts(two))  # type: ignore[misc]
        all_of_it = rendering + whole_us(whole, text, two.add_special)
        turn = median_us(lambda state=state: ids_of(state["model"], two), had_one_before)  # type: ignore[misc]
        again = median_us(lambda state=state: ids_of(state["model"], two))  # type: ignore[misc]
        print(
            f"{name:40}{way:>12}{tokens:>8}{rendering:>8.0f}{all_of_it:>9.0f}{turn:>8.0f}{again:>8.0f}"
            f"{all_of_it / turn:>8.1f}x"
        )


def worst_gap_ms(call: Callable[[], object]) -> tuple[float, float]:
    """How long this thread had to wait at most while another one ran ``call``, and how long that took."""
    thread = threading.Thread(target=call)
    worst, start = 0, time.perf_counter_ns()
    last = start
    thread.start()
    while thread.is_alive():
        now = time.perf_counter_ns()
        worst, last = max(worst, now - last), now
    return worst / 1e6, (time.perf_counter_ns() - start) / 1e6


def main() -> None:
    rng = random.Random(1)
    library = trained()
    templates = {"default": ChatTemplate(CHATML, {})}
    chat, text = "/v1/chat/completions", "/v1/completions"
    print(f"{'microseconds':40}{'':>12}{'tokens':>8}{'render':>8}{'whole':>9}{'turn':>8}{'again':>8}")
    for turns in (1, 10, 40):
        history = [
            {"role": ("user", "assistant")[i % 2], "content": prose(rng, library, 8000 // turns)}
            for i in range(turns)
        ]
        more = [
            {"role": "assistant", "content": prose(rng, library, 100)},
            {"role": "user", "content": prose(rng, library, 100)},
        ]
        name = f"8,000 tokens in {turns} messages, 200 more"
        compare(
            name, library, templates, body(chat, messages=history), body(chat, messages=[*history, *more])
        )
    prompt = prose(rng, library, 8000)
    longer = prompt + "\n" + prose(rng, library, 200)
    compare(
        "8,000 tokens of text, 200 more",
        library,
        templates,
        body(text, prompt=prompt),
        body(text, prompt=longer),
    )
    large = prose(rng, library, 50_000)
    cuts = Cuts(library.to_str())
    fast = quick(library)
    assert fast is not None, "fastokens is not installed"
    ways = {"tokenizers": plain(library), "fastokens": fast}
    for what, call in {
        "Tokenizer.encode": lambda: library.encode(large),
        "in pieces by tokenizers": lambda: Tokenizer(ways["tokenizers"], cuts, Memory(1 << 26)).encode(
            large, add_special=False
        ),
        "in pieces by fastokens": lambda: Tokenizer(ways["fastokens"], cuts, Memory(1 << 26)).encode(
            large, add_special=False
        ),
    }.items():
        gap, took = worst_gap_ms(call)
        print(f"50,000 tokens in a thread, {what}: {took:.0f} ms; another thread waited at most {gap:.1f} ms")


if __name__ == "__main__":
    main()
