"""The model server as a function of time: continuous batching, chunked prefill, prefix cache, preemption.

No I/O and no clock: whoever drives it says what time it is. ``start`` begins a run of steps and sets
``due_s``, ``finish`` ends it and tells what happened. While the batch does not change its decode steps are
one run, computed in closed form; an arrival or a cancellation ends the run with the step under way. So work
is per change of the batch, not per step or token.

As in vLLM: running sequences come first, each decoding one takes a token of the step's budget, the rest
goes to prefill in order of arrival. A prompt is admitted when the whole of it fits (vLLM's default,
``scheduler_reserve_full_isl``) and here takes its blocks at once. Out of blocks, the newest goes back to
the queue's head and is computed again. The last token of a prompt is always computed.

Its parts: ``sequence`` (a request), ``batch`` (who decodes, and how far they are), ``kv_cache``,
``step_cost`` (how long steps last). What differs between engines is in these.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Sequence

from pointsman.sim.batch import DecodeBatch, PlainBatch
from pointsman.sim.cpu_tier import LOAD_SPEED, CpuTier
from pointsman.sim.kv_cache import KVCache
from pointsman.sim.kv_journal import Journal
from pointsman.sim.profiles import EngineParameters
from pointsman.sim.sequence import EngineRequest, Phase
from pointsman.sim.speculative import SpeculativeBatch
from pointsman.sim.step_cost import Run, StepCost

__all__ = ["Engine", "EngineRequest", "Phase", "Ran"]


EVICTED_LATE_STEPS = 8
"""An engine that keeps a journal has no longer runs while they evict, so that what is evicted is known
soon.
"""


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

    def __init__(self, parameters: EngineParameters, journal: Journal | None = None) -> None:
        """``journal`` is told what is cached; what is computed in a step is in it once the step has begun."""
        self.parameters = parameters
        self.journal = journal
        self.slowdown = 1.0
        """Factor on the duration of steps that begin from now on."""
        self._block = parameters.block_tokens
        self._boot()

    def _boot(self) -> None:
        variants = self.parameters.variants
        cpu_blocks = self.parameters.cpu_blocks
        self.cpu_tier = CpuTier(cpu_blocks, self.journal) if cpu_blocks else None
        watched = self.journal is not None or cpu_blocks > 0
        self.kv = KVCache(self.parameters.kv_blocks, self._evicted if watched else None)
        self.waiting: OrderedDict[EngineRequest, None] = OrderedDict()
        self.running: dict[EngineRequest, None] = {}
        """In order of admission."""
        self.due_s = math.inf
        """When the run under way ends; infinite when idle."""
        self.prompt_tokens = 0
        self.cache_queries_tokens = 0
        self.cache_hits_tokens = 0
        """Those found on the GPU."""
        self.fetched_tokens = 0
        """Those found in the CPU's memory, of ``cache_queries_tokens`` - ``cache_hits_tokens``."""
        self.preemptions = 0
        self._cost = StepCost(self.parameters)
        self._batch: DecodeBatch = PlainBatch(self._block)
        if variants.num_speculative_tokens:
            self._batch = SpeculativeBatch(self._block, variants)
        self._generated = 0  # all but what the decoding sequences got since they joined
        self._finishes: list[tuple[int, int, EngineRequest]] = []
        self._submitted = 0
        self._blocked = False  # the queue's head does not fit; prompts are published by then: nothing changes
        # that but a sequence that leaves
        self._partial: EngineRequest | None = None
        self._completing: list[EngineRequest] = []
        self._run: Run | None = None
        self._began_s = 0.0
        self._steps = 0  # of the run under way
        self._steps_over = 0
        self._step_prefill = 0
        self._prefill_cost = 0.0
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

    @property
    def step(self) -> int:
        """Steps completed."""
        return self._batch.step

    @property
    def decoding(self) -> int:
        """Decoding sequences."""
        return self._batch.sequences

    @property
    def context_tokens(self) -> float:
        """Of the decoding sequences, in the coming step."""
        return self._batch.context_tokens

    @property
    def generated_tokens(self) -> int:
        return self._generated + self._batch.gained_tokens

    def generated(self, request: EngineRequest) -> int:
        """Output tokens of ``request``: at the end of the last completed step that ``observe`` knows of."""
        if request.phase is Phase.DECODE:
            return request.generated + self._batch.gained(request)
        return request.generated

    def fits(self, prompt_tokens: int, output_tokens: int) -> bool:
        """Whether such a sequence can ever run here: alone, with the whole KV cache."""
        tokens = prompt_tokens + max(0, output_tokens - 1) + self.parameters.variants.num_speculative_tokens
        return -(-tokens // self._block) <= self.kv.blocks

    def submit(self, request: EngineRequest, now_s: float) -> None:
        """Queue it. It joins the batch with the next step; ``start`` when idle."""
        assert self.fits(request.prompt_tokens, request.output_tokens)
        request.arrived_s = now_s
        if not self.parameters.prefix_caching:
            request.blocks = ()
            request.continuation = None
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
            self._blocked = False
        else:
            if request is self._partial:
                self._partial = None
            elif request.phase is Phase.PREFILL:
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
        assert self._run is not None
        over = self._run.steps_within((now_s - self._began_s) / self._factor)
        self._advance(min(over, self._steps - 1) - self._steps_over)

    def interrupt(self, now_s: float) -> None:
        """Let the run end with the step under way, so that what changed counts from the next one on."""
        self.observe(now_s)
        if self._steps - self._steps_over <= 1:
            return
        assert self._run is not None
        self._steps = self._steps_over + 1
        self.due_s = self._began_s + self._factor * self._run.seconds(self._steps)

    def reset(self, now_s: float) -> list[EngineRequest]:
        """Crash, and come back as a new process: sequences, cache and counters are lost; whose sequences."""
        self.observe(now_s)
        lost = [*self.running, *self.waiting]
        for request in lost:
            request.generated = self.generated(request)
            request.phase = Phase.DONE
            request.ended_s = now_s
        self._boot()
        return lost

    def start(self, now_s: float, max_steps: int = 1 << 40) -> None:
        """Begin the next run: as many steps as the batch stays the same, at most ``max_steps``."""
        assert self.idle
        if not self.running and not self.waiting:
            self.due_s = math.inf
            return
        batch = self._batch
        preempted = self._make_room()
        budget = max(0, self.parameters.step_tokens - batch.sequences * batch.tokens_each)
        prefill = 0
        self._prefill_cost = 0.0
        if self._partial is not None:
            prefill = self._prefill(self._partial, budget)
        if self.waiting and not preempted and not self._blocked:
            prefill += self._admit(now_s, budget - prefill)
        assert self.running, "what fits alone was not admitted"
        self._run = run = self._cost.run(batch, self._prefill_cost)
        self._steps = 1 if prefill or preempted else self._unchanged(min(max_steps, run.most_steps))
        self._step_prefill = prefill
        self._began_s = now_s
        self._factor = self.slowdown
        self.due_s = now_s + self._factor * run.seconds(self._steps)

    def finish(self) -> Ran:
        """The run is over, at ``due_s``."""
        self._advance(self._steps - 1 - self._steps_over)
        batch = self._batch
        ran = Ran(self._steps, self.due_s - self._began_s, batch.sequences, self._step_prefill)
        batch.complete()
        self._steps = self._steps_over = 0
        for request in self._completing:
            self._begin_decode(request, ran)
        self._completing.clear()
        self._pop_finished(ran)
        self.due_s = math.inf
        return ran

    def reset_cache(self) -> bool:
        """Forget all KV blocks, in each memory; False, and nothing done, while a sequence holds one."""
        if not self.kv.clear():
            return False
        if self.cpu_tier is not None:
            self.cpu_tier.clear()
        if self.journal is not None:
            self.journal.cleared()
        return True

    def _evicted(self, hashes: Sequence[int]) -> None:
        if self.cpu_tier is not None:
            self.cpu_tier.keep(hashes)
        if self.journal is not None:
            self.journal.evicted(hashes)

    def _advance(self, steps: int) -> None:
        """Complete ``steps`` decode steps of the run and be in the one after."""
        if steps:
            self.kv.take(self._batch.advance(steps))
            self._steps_over += steps

    def _make_room(self) -> bool:
        """Take the blocks that decoding sequences need for the next step; True if some had to go for it."""
        preempted = False
        while (blocks := self._batch.needs_blocks()) > self.kv.available_blocks:
            self._preempt(next(reversed(self.running)))
            preempted = True
        if blocks:
            self.kv.take(blocks)
        self._batch.begin()
        return preempted

    def _preempt(self, request: EngineRequest) -> None:
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
        self._blocked = False
        del self.running[request]
        if request.phase is Phase.DECODE:
            gained = self._batch.gained(request)
            held = self._batch.leave(request)
            request.generated += gained
            self._generated += gained
        else:
            gained, held = 0, -(-request.prefill_tokens // self._block)
        if request.phase is Phase.DECODE and request.continuation is not None and request.published:
            self._publish(request, request.continuation(request.prefill_tokens + gained))
        request.finish_at = -1
        self.kv.release(request.last, held - request.shared)
        request.last = None

    def _admit(self, now_s: float, budget: int) -> int:
        """Let waiting sequences join, first come first served, while limits and budget allow; their prefill
        tokens of this step.
        """
        prefill = 0
        limit = self.parameters.max_sequences
        while self.waiting and prefill < budget and len(self.running) < limit:
            request = next(iter(self.waiting))
            tokens = request.prompt_tokens + request.generated
            limit_blocks = (tokens - 1) // self._block
            fetched = 0 if self.cpu_tier is None else self._fetchable(request, limit_blocks)
            held = self.kv.admit(request.blocks, limit_blocks, -(-tokens // self._block))
            if held is None:
                self._blocked = True
                break
            del self.waiting[request]
            self.running[request] = None
            request.phase = Phase.PREFILL
            request.last, request.shared = held
            request.published = True
            request.prefill_tokens = tokens
            hit = request.shared * self._block
            self._prefill_cost += fetched / LOAD_SPEED
            request.computed_tokens = hit + fetched
            if not request.preemptions:
                request.scheduled_s = now_s
                request.cached_tokens = hit + fetched
                self.cache_queries_tokens += tokens
                self.cache_hits_tokens += hit
                self.fetched_tokens += fetched
            prefill += self._prefill(request, budget - prefill)
        return prefill

    def _fetchable(self, request: EngineRequest, limit: int) -> int:
        """Tokens of the first ``limit`` blocks that come from the CPU's memory, behind those the GPU has."""
        assert self.cpu_tier is not None
        there = self.kv.match(request.blocks, limit)
        return self.cpu_tier.fetch(request.blocks[there:limit]) * self._block

    def _prefill(self, request: EngineRequest, budget: int) -> int:
        """Compute the next of the prompt's tokens in this step; how many."""
        tokens = min(budget, request.prefill_tokens - request.computed_tokens)
        self._prefill_cost += self._cost.prefill(request.computed_tokens, tokens)
        request.computed_tokens += tokens
        full = min(request.computed_tokens // self._block, len(request.blocks))
        if full > request.shared and request.published:
            self._publish(request, request.blocks[request.shared : full])
        if request.computed_tokens == request.prefill_tokens:
            self._completing.append(request)
            self._partial = None
        else:
            self._partial = request
        return tokens

    def _publish(self, request: EngineRequest, hashes: Sequence[int]) -> None:
        before = request.last
        last = self.kv.publish(before, hashes)
        if last is before:  # somebody else's copy is the one to be found
            request.published = False
            return
        if self.journal is not None:
            assert request.content is not None
            parent = None if before is None else before.last_hash
            self.journal.stored(request.content, request.shared, hashes, parent)
        request.last = last
        request.shared += len(hashes)

    def _begin_decode(self, request: EngineRequest, ran: Ran) -> None:
        if not request.generated:
            request.first_token_s = self.due_s
            self.prompt_tokens += request.prompt_tokens
        if request.output_tokens:
            request.generated += 1
            self._generated += 1
        request.phase = Phase.DECODE
        self._batch.join(request)
        self._submitted += 1
        heapq.heappush(self._finishes, (request.finish_at, self._submitted, request))
        ran.started.append(request)

    def _pop_finished(self, ran: Ran) -> None:
        finishes = self._finishes
        step = self._batch.step
        while finishes and finishes[0][0] <= step:
            at, _, request = heapq.heappop(finishes)
            if request.finish_at != at:
                continue  # cancelled, or preempted since
            self._leave(request)
            request.phase = Phase.DONE
            request.ended_s = self.due_s
            ran.finished.append(request)

    def _unchanged(self, most: int) -> int:
        """Steps until a sequence ends or blocks may run out. Room was made for the first."""
        finishes = self._finishes
        while finishes[0][2].finish_at != finishes[0][0]:
            heapq.heappop(finishes)
        batch = self._batch
        if self.journal is not None:
            most = min(most, max(EVICTED_LATE_STEPS, batch.certain_steps(self.kv.untouched_blocks)))
        covered = 1 + batch.certain_steps(self.kv.available_blocks)
        return max(1, min(most, finishes[0][0] - batch.step, covered))
