"""A decode batch with speculative decoding: sequences advance by several tokens a step, each at its own
rate.
"""

from __future__ import annotations

from collections.abc import Sequence

from pointsman.sim.drafts import BITS, MASK, Drafts
from pointsman.sim.sequence import EngineRequest
from pointsman.sim.variants import Variants


class SpeculativeBatch:
    """Before a step each sequence has room for all drafted tokens. A step's duration counts each sequence's
    context as it would be had it always got the request's average: so runs of steps keep a closed form, while
    tokens come as they are drawn. What is asked of it costs a look at each sequence.
    """

    def __init__(self, block_tokens: int, variants: Variants) -> None:
        self.step = 0
        self.tokens_each = 1 + variants.num_speculative_tokens
        self.sequences = 0
        self.context_tokens: float = 0
        self.growth_tokens: float = 0
        self._block = block_tokens
        self._drafts = Drafts(variants)
        self._begun = 0
        self._held = 0  # blocks
        self._needed = 0  # more of them, for the next step
        self._members: dict[EngineRequest, _Member] = {}

    @property
    def gained_tokens(self) -> int:
        return sum(map(self.gained, self._members))

    def join(self, request: EngineRequest) -> None:
        draft = request.draft
        if draft is None:
            draft = request.draft = self._drafts.draw()
        left = request.output_tokens - request.generated
        request.decode_from = self.step
        request.finish_at = draft.reached(self.step, left) if left else self.step
        self.sequences += 1
        self.context_tokens += request.prefill_tokens + 1
        self.growth_tokens += draft.tokens_per_step
        room = request.prefill_tokens - draft.before(self.step) + self.tokens_each + self._block - 1
        self._members[request] = (draft.sums, draft.place, room)
        self._held += -(-request.prefill_tokens // self._block)

    def gained(self, request: EngineRequest) -> int:
        draft = request.draft
        assert draft is not None
        drawn = draft.before(self.step) - draft.before(request.decode_from)
        return min(drawn, request.output_tokens - request.generated)

    def leave(self, request: EngineRequest) -> int:
        draft = request.draft
        assert draft is not None
        _, _, room = self._members.pop(request)
        held = -(-request.prefill_tokens // self._block)
        if self._begun > request.decode_from:
            held = (room + draft.before(self._begun - 1)) // self._block
        self._held -= held
        self.sequences -= 1
        self.growth_tokens -= draft.tokens_per_step
        steps = self.step - request.decode_from
        self.context_tokens -= request.prefill_tokens + 1 + steps * draft.tokens_per_step
        return held

    def needs_blocks(self) -> int:
        self._needed = self._blocks(self.step) - self._held
        return self._needed

    def certain_steps(self, blocks: int) -> int:
        return blocks // self.sequences * self._block // self.tokens_each

    def begin(self) -> None:
        self._begun += 1
        self._held += self._needed

    def advance(self, steps: int) -> int:
        self.step += steps
        self._begun += steps
        self.context_tokens += steps * self.growth_tokens
        blocks = self._blocks(self.step) - self._held
        self._held += blocks
        return blocks

    def complete(self) -> None:
        self.step += 1
        self.context_tokens += self.growth_tokens

    def _blocks(self, step: int) -> int:
        """Blocks that all need for the step behind the first ``step``."""
        blocks, size = 0, self._block
        for sums, place, room in self._members.values():  # the hot loop: ``Draft.before`` written out
            at = place + step
            blocks += (room + (at >> BITS) * sums[-1] + sums[at & MASK]) // size
        return blocks


_Member = tuple[Sequence[int], int, int]
"""A sequence's draws (sums and place), and what makes them, divided by a block, the blocks a step needs."""
