"""The model server as a function of time: continuous batching, chunked prefill, prefix cache, preemption.

No I/O and no clock: whoever drives it says what time it is. ``start`` begins a run of steps and sets
``due_s``, ``finish`` ends it and tells what happened. While the batch does not change its decode steps are
one run, computed in closed form; an arrival or a cancellation ends the run with the step under way. So work
is per change of the batch, not per step or token.

As in vLLM: running sequences come first, each decoding one takes a token of the step's budget, the rest goes
to prefill in order of arrival. A prompt is admitted when the whole of it fits (vLLM's default,
``scheduler_reserve_full_isl``) and here takes its blocks at once. Out of blocks, the newest goes back to the
queue's head and is computed again. The last token of a prompt is always computed.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from enum import Enum

from pointsman.sim.kv_cache import KVCache, Segment
from pointsman.sim.profiles import EngineParameters


class Phase(Enum):
    """Where a sequence is in its life."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    DONE = "done"


class EngineRequest:
    """One sequence: a prompt as block hashes and a token count, and how many tokens it will answer with.

    Submit it once. What is public is for reading.
    """

    __slots__ = (
        "_computed_tokens",
        "_continue",
        "_decode_from",
        "_finish_at",
        "_generated",
        "_last",
        "_prefill_tokens",
        "_published",
        "_shared",
        "arrived_s",
        "blocks",
        "cached_tokens",
        "ended_s",
        "first_token_s",
        "output_tokens",
        "owner",
        "phase",
        "preemptions",
        "prompt_tokens",
        "scheduled_s",
    )

    def __init__(
        self,
        blocks: Sequence[int],
        prompt_tokens: int,
        output_tokens: int,
        *,
        owner: object = None,
        continuation: Callable[[int], Sequence[int]] | None = None,
    ) -> None:
        """``blocks``: chained hashes of the prompt's full blocks, none where it cannot be cached.
        ``continuation``: hashes of the full blocks behind these when so many tokens are in the KV cache, if
        the output is to be found again. ``output_tokens`` 0 is a prefill alone (an embedding).
        """
        assert prompt_tokens > 0
        assert output_tokens >= 0
        self.blocks = blocks
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.owner = owner
        self.phase = Phase.WAITING
        self.cached_tokens = 0
        """Prompt tokens found in the cache when it was first scheduled."""
        self.preemptions = 0
        self.arrived_s = self.scheduled_s = self.first_token_s = self.ended_s = math.nan
        self._continue = continuation
        self._generated = 0  # tokens out when decoding began (or stopped)
        self._decode_from = 0  # the engine's step count at that moment
        self._finish_at = -1  # step count at which the last token is out
        self._prefill_tokens = 0  # tokens to have in the KV cache before it decodes
        self._computed_tokens = 0
        self._last: Segment | None = None
        self._shared = 0  # blocks held through ``_last``
        self._published = True


class Ran:
    """What a run of steps brought."""

    __slots__ = ("decoding", "duration_s", "finished", "prefill_tokens", "started", "steps")

    def __init__(self, steps: int, duration_s: float, decoding: int, prefill_tokens: int) -> None:
        self.steps = steps
        self.duration_s = duration_s
        self.decoding = decoding
        self.prefill_tokens = prefill_tokens
        self.started: list[EngineRequest] = []
        """Whose prefill is over: a token is out, its first or, after a preemption, the next."""
        self.finished: list[EngineRequest] = []


class Engine:
    """One engine. Times are seconds on the caller's clock and never go back."""

    def __init__(self, parameters: EngineParameters) -> None:
        self.parameters = parameters
        self.slowdown = 1.0
        """Factor on the duration of steps that begin from now on."""
        self._block = parameters.block_tokens
        self._boot()

    def _boot(self) -> None:
        self.kv = KVCache(self.parameters.kv_blocks)
        self.waiting: OrderedDict[EngineRequest, None] = OrderedDict()
        self.running: dict[EngineRequest, None] = {}
        """In order of admission."""
        self.due_s = math.inf
        """When the run under way ends; infinite when idle."""
        self.step = 0
        """Steps completed. A decoding sequence gets one token in each."""
        self.decoding = 0
        self.context_tokens = 0
        """Of the decoding sequences, the token of the coming step included."""
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.cache_queries_tokens = 0
        self.cache_hits_tokens = 0
        self.preemptions = 0
        self._grows_at = [0] * self._block  # decoding sequences by the step, modulo block, that needs a block
        self._kv_step = 0  # decode steps whose blocks have been taken
        self._finishes: list[tuple[int, int, EngineRequest]] = []
        self._submitted = 0
        self._partial: EngineRequest | None = None
        self._completing: list[EngineRequest] = []
        self._began_s = 0.0
        self._steps = 0  # of the run under way
        self._steps_over = 0
        self._step_prefill = 0
        self._run_context = 0  # context tokens when it began
        self._factor = 1.0

    @property
    def idle(self) -> bool:
        return self._steps == 0

    @property
    def run_s(self) -> float:
        """Duration of the run under way."""
        return self.due_s - self._began_s

    @property
    def kv_usage(self) -> float:
        """Share of KV blocks that somebody holds."""
        return self.kv.used_blocks / self.kv.blocks

    def generated(self, request: EngineRequest) -> int:
        """Output tokens of ``request``: at the end of the last completed step that ``observe`` knows of."""
        if request.phase is Phase.DECODE:
            return request._generated + self.step - request._decode_from
        return request._generated

    def fits(self, prompt_tokens: int, output_tokens: int) -> bool:
        """Whether such a sequence can ever run here: alone, with the whole KV cache."""
        return math.ceil((prompt_tokens + max(0, output_tokens - 1)) / self._block) <= self.kv.blocks

    def submit(self, request: EngineRequest, now_s: float) -> None:
        """Queue it. It joins the batch with the next step; ``start`` when idle."""
        assert self.fits(request.prompt_tokens, request.output_tokens)
        request.arrived_s = now_s
        if not self.parameters.prefix_caching:
            request.blocks = ()
            request._continue = None
        if not self.waiting:  # else the head of the queue is what cannot join
            self.interrupt(now_s)
        self.waiting[request] = None

    def cancel(self, request: EngineRequest, now_s: float) -> bool:
        """Forget it and free its blocks at once; False when it was over. The step under way lasts as long as
        it would have.
        """
        if request.phase is Phase.DONE:
            return False
        self.interrupt(now_s)
        if request.phase is Phase.WAITING:
            del self.waiting[request]
        else:
            if request.phase is Phase.DECODE:
                request._generated = self.generated(request)
            elif request is self._partial:
                self._partial = None
            else:
                self._completing.remove(request)
            self._leave(request)
        request.phase = Phase.DONE
        request.ended_s = now_s
        return True

    def observe(self, now_s: float) -> None:
        """Bring counters, ``kv_usage`` and ``generated`` up to ``now_s``. What happens, and when, stays as it
        is: times are computed from the run's beginning, however often somebody looks.
        """
        if self._steps - self._steps_over <= 1:
            return
        within_s = (now_s - self._began_s) / self._factor
        over = self.parameters.steps_within(within_s, self.decoding, self._run_context)
        self._advance(min(over, self._steps - 1) - self._steps_over)

    def interrupt(self, now_s: float) -> None:
        """Let the run end with the step under way, so that what changed counts from the next one on."""
        if self._steps - self._steps_over <= 1:
            return
        self.observe(now_s)
        if self._steps_over + 1 == self._steps:
            return
        self._steps = self._steps_over + 1
        self.due_s = self._began_s + self._factor * self.parameters.decode_s(
            self._steps, self.decoding, self._run_context
        )

    def reset(self, now_s: float) -> list[EngineRequest]:
        """Crash, and come back as a new process: sequences, cache and counters are lost; whose sequences."""
        self.observe(now_s)
        lost = [*self.running, *self.waiting]
        for request in lost:
            request._generated = self.generated(request)
            request.phase = Phase.DONE
            request.ended_s = now_s
        self._boot()
        return lost

    def start(self, now_s: float, max_steps: int = 1 << 40) -> None:
        """Begin the next run: as many steps as the batch stays the same, at most ``max_steps``."""
        assert self.idle
        preempted = self._make_room()
        budget = max(0, self.parameters.step_tokens - self.decoding)
        prefill = 0
        if self._partial is not None:
            prefill = self._prefill(self._partial, budget)
        if self.waiting and not preempted:
            prefill += self._admit(now_s, budget - prefill)
        if not self.running:
            self.due_s = math.inf
            return
        self._steps = 1 if prefill or preempted else self._unchanged(max_steps)
        self._began_s = now_s
        self._run_context = self.context_tokens
        self._factor = self.slowdown
        self._step_prefill = prefill
        self._kv_step += 1
        if prefill:
            duration_s = self.parameters.step_s(self.decoding, self.context_tokens, prefill)
        else:
            duration_s = self.parameters.decode_s(self._steps, self.decoding, self.context_tokens)
        self.due_s = now_s + self._factor * duration_s

    def finish(self) -> Ran:
        """The run is over, at ``due_s``."""
        self._advance(self._steps - 1 - self._steps_over)
        ran = Ran(self._steps, self.due_s - self._began_s, self.decoding, self._step_prefill)
        self.step += 1
        self.context_tokens += self.decoding
        self.generated_tokens += self.decoding
        self._steps = self._steps_over = 0
        for request in self._completing:
            self._begin_decode(request, ran)
        self._completing.clear()
        self._pop_finished(ran)
        self.due_s = math.inf
        return ran

    def _advance(self, steps: int) -> None:
        """Complete ``steps`` decode steps of the run and be in the one after."""
        if not steps:
            return
        rounds, rest = divmod(steps, self._block)
        self.kv.take(
            rounds * self.decoding
            + sum(self._grows_at[(self.step + i) % self._block] for i in range(1, rest + 1))
        )
        self.step += steps
        self._kv_step += steps
        self._steps_over += steps
        self.context_tokens += steps * self.decoding
        self.generated_tokens += steps * self.decoding

    def _make_room(self) -> bool:
        """Take the blocks that decoding sequences need for the next step; True if some had to go for it."""
        preempted = False
        place = self.step % self._block
        while self._grows_at[place] > self.kv.available_blocks:
            self._preempt(next(reversed(self.running)))
            preempted = True
        self.kv.take(self._grows_at[place])
        return preempted

    def _preempt(self, request: EngineRequest) -> None:
        request._generated = self.generated(request)
        if request is self._partial:
            self._partial = None
        self._leave(request)
        request.phase = Phase.WAITING
        request.preemptions += 1
        self.preemptions += 1
        self.waiting[request] = None
        self.waiting.move_to_end(request, last=False)

    def _leave(self, request: EngineRequest) -> None:
        """Take a running sequence out of the batch and give its blocks back."""
        del self.running[request]
        tokens = held = request._prefill_tokens
        if request.phase is Phase.DECODE:
            tokens += self.step - request._decode_from
            held += self._kv_step - request._decode_from
            self.decoding -= 1
            self.context_tokens -= tokens + 1
            self._grows_at[(request._decode_from - request._prefill_tokens) % self._block] -= 1
            if request._continue is not None and request._published:
                self._publish(request, request._continue(tokens))
        request._finish_at = -1
        self.kv.release(request._last, -(-held // self._block) - request._shared)
        request._last = None

    def _admit(self, now_s: float, budget: int) -> int:
        """Let waiting sequences join, first come first served, while limits and budget allow; their prefill
        tokens of this step.
        """
        prefill = 0
        limit = self.parameters.max_sequences
        while self.waiting and prefill < budget and len(self.running) < limit:
            request = next(iter(self.waiting))
            tokens = request.prompt_tokens + request._generated
            held = self.kv.admit(request.blocks, (tokens - 1) // self._block, -(-tokens // self._block))
            if held is None:
                break
            del self.waiting[request]
            self.running[request] = None
            request.phase = Phase.PREFILL
            request._last, request._shared = held
            request._published = True
            request._prefill_tokens = tokens
            request._computed_tokens = hit = request._shared * self._block
            if not request.preemptions:
                request.scheduled_s = now_s
                request.cached_tokens = hit
                self.cache_queries_tokens += tokens
                self.cache_hits_tokens += hit
            prefill += self._prefill(request, budget - prefill)
        return prefill

    def _prefill(self, request: EngineRequest, budget: int) -> int:
        """Compute the next of the prompt's tokens in this step; how many."""
        tokens = min(budget, request._prefill_tokens - request._computed_tokens)
        request._computed_tokens += tokens
        full = min(request._computed_tokens // self._block, len(request.blocks))
        if full > request._shared and request._published:
            self._publish(request, request.blocks[request._shared : full])
        if request._computed_tokens == request._prefill_tokens:
            self._completing.append(request)
            self._partial = None
        else:
            self._partial = request
        return tokens

    def _publish(self, request: EngineRequest, hashes: Sequence[int]) -> None:
        last = self.kv.publish(request._last, hashes)
        if last is request._last:  # somebody else's copy is the one to be found
            request._published = False
            return
        request._last = last
        request._shared += len(hashes)

    def _begin_decode(self, request: EngineRequest, ran: Ran) -> None:
        if not request._generated:
            request.first_token_s = self.due_s
            self.prompt_tokens += request.prompt_tokens
        request._decode_from = self.step
        if request.output_tokens:
            request._generated += 1
            self.generated_tokens += 1
        request.phase = Phase.DECODE
        self.decoding += 1
        self.context_tokens += request._prefill_tokens + 1
        self._grows_at[(self.step - request._prefill_tokens) % self._block] += 1
        request._finish_at = self.step + request.output_tokens - request._generated
        self._submitted += 1
        heapq.heappush(self._finishes, (request._finish_at, self._submitted, request))
        ran.started.append(request)

    def _pop_finished(self, ran: Ran) -> None:
        finishes = self._finishes
        while finishes and finishes[0][0] <= self.step:
            at, _, request = heapq.heappop(finishes)
            if request._finish_at != at:
                continue  # cancelled, or preempted since
            request._generated = request.output_tokens
            self._leave(request)
            request.phase = Phase.DONE
            request.ended_s = self.due_s
            ran.finished.append(request)

    def _unchanged(self, most: int) -> int:
        """Steps until a sequence ends or blocks may run out. Room was made for the first."""
        finishes = self._finishes
        while finishes[0][2]._finish_at != finishes[0][0]:
            heapq.heappop(finishes)
        covered = 1 + self.kv.available_blocks // self.decoding * self._block
        return max(1, min(most, finishes[0][0] - self.step, covered))
