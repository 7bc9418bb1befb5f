"""Agents: a call that fans out, branches that call tools, and a call that joins what they found."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Annotated, NamedTuple

from pointsman.bench.workloads.call import Call
from pointsman.bench.workloads.family import Count, Exponent, Family, Seconds, Tokens, says
from pointsman.bench.workloads.lengths import Exponential, Lengths
from pointsman.bench.workloads.passages import Passage, Shared, joined, passage
from pointsman.bench.workloads.popularity import Zipf


class Agents(Family, frozen=True, tag="agents"):
    """Trees of calls. What a root call answers is gone on from by ``branches``; each makes up to ``levels``
    calls one after the other, with a tool's result between them; when all have ended, a last call gets the
    root's prompt and answer and what each branch answered last. The load starts trees. Where a call fails,
    those that would have followed are not made.
    """

    system_prompts: Annotated[Count, says("distinct ones that trees start with: agents and their tools")] = 5
    system_prompt_len: Annotated[Tokens, says("length of each")] = 4000
    zipf: Annotated[Exponent, says("exponent of the system prompts' popularity; 0: all alike")] = 0.0
    task_len: Annotated[Count, says("what the root call adds")] = 500
    branches: Annotated[Count, says("that go on from the root")] = 4
    levels: Annotated[Count, says("most calls of a branch; each number from 1 is equally likely")] = 3
    step_len: Annotated[Count, says("what each further call adds: an instruction, a tool's result")] = 300
    tool_s: Annotated[Seconds, says("mean time of a tool between calls of a branch, exponential")] = 2.0
    output_len: Annotated[Count, says("mean length of an output")] = 200
    output_shape: Annotated[Lengths, says("how it varies")] = Exponential()

    def calls(self, seed: int) -> Iterator[Call]:
        """Root calls, endlessly; the others follow from them."""
        systems = Shared(f"agents {seed} system", self.system_prompt_len)
        popularity = Zipf(self.system_prompts, self.zipf)
        for number in count():
            name = f"agents {seed} {number}"
            rng = random.Random(name)
            group = popularity.draw(rng)
            yield _Tree(self, name, group, rng).root(systems.get(group))

    def plan(self, rng: random.Random) -> list[_Step]:
        """The calls of one branch."""
        return [
            _Step(
                rng.expovariate(1 / self.tool_s) if level and self.tool_s else 0.0,
                self.output_shape.draw(rng, self.output_len),
            )
            for level in range(rng.randint(1, self.levels))
        ]


class _Step(NamedTuple):
    wait_s: float
    """Before this call."""
    output_len: int


class _Tree:
    """One tree: what is planned, and what its branches have found."""

    def __init__(self, family: Agents, name: str, group: int, rng: random.Random) -> None:
        self._family = family
        self._name = name
        self._group = group
        self._root_len = family.output_shape.draw(rng, family.output_len)
        self._last_len = family.output_shape.draw(rng, family.output_len)
        self._branches = [family.plan(rng) for _ in range(family.branches)]
        self._found: dict[int, Passage] = {}
        """What each branch that has ended answered last."""

    def root(self, system: Passage) -> Call:
        """The call from which all others follow."""
        prompt = joined(system, passage(f"{self._name} task", self._family.task_len))
        answer = passage(f"{self._name} plan", self._root_len)
        said = joined(prompt, answer)

        def then() -> Sequence[tuple[float, Call]]:
            return [self._step(branch, 0, said, said) for branch in range(len(self._branches))]

        return self._call(prompt, answer.tokens, answer.text, then)

    def _step(self, branch: int, level: int, said: Passage, root: Passage) -> tuple[float, Call]:
        steps = self._branches[branch]
        step, name = steps[level], f"{self._name} {branch} {level}"
        prompt = joined(said, passage(f"{name} step", self._family.step_len))
        answer = passage(f"{name} answer", step.output_len)
        if level + 1 < len(steps):

            def then() -> Sequence[tuple[float, Call]]:
                return [self._step(branch, level + 1, joined(prompt, answer), root)]

            return step.wait_s, self._call(prompt, answer.tokens, answer.text, then)
        return step.wait_s, self._call(prompt, answer.tokens, "", lambda: self._ended(branch, answer, root))

    def _ended(self, branch: int, answer: Passage, root: Passage) -> Sequence[tuple[float, Call]]:
        self._found[branch] = answer
        if len(self._found) < len(self._branches):
            return ()
        found = [self._found[branch] for branch in range(len(self._branches))]
        prompt = joined(root, *found, passage(f"{self._name} join", self._family.step_len))
        return [(0.0, self._call(prompt, self._last_len))]

    def _call(
        self,
        prompt: Passage,
        output_len: int,
        answer: str = "",
        then: Callable[[], Sequence[tuple[float, Call]]] | None = None,
    ) -> Call:
        told = self._family.told(output_len)
        return Call(*prompt, output_len, self._group, max_tokens=told, answer=answer, then=then)
