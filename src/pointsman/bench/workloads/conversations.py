"""Chats: each turn's prompt is everything that was said before, and a new question."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Annotated, NamedTuple

from pointsman.bench.workloads.call import Call
from pointsman.bench.workloads.family import Count, Exponent, Family, Seconds, Tokens, says
from pointsman.bench.workloads.lengths import Exponential, Fixed, Lengths
from pointsman.bench.workloads.passages import Passage, Shared, joined, passage
from pointsman.bench.workloads.popularity import Zipf


class Conversations(Family, frozen=True, tag="conversations"):
    """Multi-turn chats. The load starts conversations; a further turn is due a think time after the answer
    before has ended, so there are ``turns`` times as many requests as the load asks for.
    """

    system_prompts: Annotated[Count, says("distinct ones that conversations start with")] = 20
    system_prompt_len: Annotated[Tokens, says("length of each")] = 1000
    zipf: Annotated[Exponent, says("exponent of the system prompts' popularity; 0: all alike")] = 0.0
    turns: Annotated[Count, says("mean number in a conversation")] = 5
    turns_shape: Annotated[Lengths, says("how it varies")] = Exponential()
    question_len: Annotated[Count, says("mean length of what the user adds in a turn")] = 150
    question_shape: Annotated[Lengths, says("how it varies")] = Fixed()
    output_len: Annotated[Count, says("mean length of an answer")] = 250
    output_shape: Annotated[Lengths, says("how it varies")] = Exponential()
    think_s: Annotated[Seconds, says("mean time from an answer's end to the next turn, exponential")] = 10.0
    max_prompt_len: Annotated[Count, says("a conversation ends before a longer prompt")] = 32768

    def calls(self, seed: int) -> Iterator[Call]:
        """First turns, endlessly; the others follow from them."""
        systems = Shared(f"conversations {seed} system", self.system_prompt_len)
        popularity = Zipf(self.system_prompts, self.zipf)
        for number in count():
            name = f"conversations {seed} {number}"
            rng = random.Random(name)
            group = popularity.draw(rng)
            chat = _Chat(name, group, self._turns(rng), self.tell_max_tokens)
            yield chat.call(0, systems.get(group))

    def _turns(self, rng: random.Random) -> Sequence[_Turn]:
        turns: list[_Turn] = []
        said = self.system_prompt_len
        for _ in range(self.turns_shape.draw(rng, self.turns)):
            turn = _Turn(
                self.question_shape.draw(rng, self.question_len),
                self.output_shape.draw(rng, self.output_len),
                rng.expovariate(1 / self.think_s) if self.think_s else 0.0,
            )
            if turns and said + turn.question_len > self.max_prompt_len:
                break
            turns.append(turn)
            said += turn.question_len + turn.output_len
        return turns


class _Turn(NamedTuple):
    question_len: int
    output_len: int
    think_s: float
    """From the end of this turn's answer to the next turn."""


class _Chat(NamedTuple):
    """One conversation as it is planned."""

    name: str
    group: int
    turns: Sequence[_Turn]
    told: bool

    def call(self, number: int, said: Passage) -> Call:
        """Turn ``number``, after all that has been ``said``."""
        turn = self.turns[number]
        prompt = joined(said, passage(f"{self.name} question {number}", turn.question_len))
        max_tokens = turn.output_len if self.told else None
        if number + 1 == len(self.turns):
            return Call(*prompt, turn.output_len, self.group, max_tokens=max_tokens)
        answer = passage(f"{self.name} answer {number}", turn.output_len)

        def then() -> Sequence[tuple[float, Call]]:
            return [(turn.think_s, self.call(number + 1, joined(prompt, answer)))]

        return Call(
            *prompt, turn.output_len, self.group, max_tokens=max_tokens, answer=answer.text, then=then
        )
