"""What a request costs at each endpoint, in seconds, kept ready so that a decision is one walk over lists.

For a request with ``u`` uncached of ``p`` prompt tokens and an answer of ``e`` tokens an endpoint costs
``wait + u * token + e * (output + p * context)``: until its first token, then a step for each token of the
answer, and in both a share of what that costs the sequences there. The four numbers change when the
endpoint's load or what is known of its speed does, not with the request.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, inf

from pointsman.predictor.kv import KvSizes
from pointsman.predictor.learned import Learned
from pointsman.predictor.lengths import Lengths
from pointsman.predictor.speed import SAMPLE_S, Speeds
from pointsman.types import Endpoint

OTHERS = 0.2
"""Share of the delay to others that counts. They are half done on average; a little less served best."""
QUEUE = 6.0
"""A second in the queue weighs so many times more for each second that is there."""
KV_SHARE = 0.95
"""Of an endpoint's KV cache that may be promised."""
LEAST_GROWTH = 0.1
"""Of its usual length that a running answer is expected to grow at least, however long it is by now."""
MEMORY = 100
"""Requests over which what is usual is averaged."""
LEVEL_MEMORY_S = 10.0
WEIGH_S = 5.0
"""In which capacities and the others' share follow: routers agree the better the less they move."""
ALONE_SHARE = 0.3
"""With more of the requests in flight from others, a router is not alone."""
OVERDUE = 2.0
"""A first output is overdue after so many times what was expected."""
STARVED_S, STARVED_SHARE = 10.0, 0.125
"""Who is believed to be slow and has had less than such a share of the mean for so long may have
recovered.
"""
SLOW = 1.2
"""Cost of a usual request, in relation to the mean of all."""
LOOK_S = 0.01
"""What an endpoint got rid of is noticed this late at most; what it is sent counts at once."""
MAX_STEP_S = 1.0
"""A pause counts as so much time: nothing was seen in it."""


Row = tuple[float, float, float, float]
"""What any request costs at an endpoint, seconds: before anything of it is computed; for each uncached
token of its prompt; for each token of its answer; and for each of its answer times each of its prompt.
"""


class Look:
    """Endpoints that are asked together, those of a model, and when they were looked at last."""

    __slots__ = ("endpoints", "looked_s", "names", "place", "sampled_s", "slots", "starved", "tight")

    def __init__(self) -> None:
        self.endpoints: Sequence[Endpoint] = ()
        self.names: list[str] = []
        self.slots: list[int] = []
        self.place: dict[int, int] = {}
        """Slot to its place among them."""
        self.looked_s = self.sampled_s = -inf
        self.tight = False
        """One of them may be short of room."""
        self.starved: int | None = None
        """Slot of one that gets next to nothing because it is believed to be slow; it may have recovered."""

    def arrange(self, endpoints: Sequence[Endpoint]) -> bool:
        """Take these; whether they are others than before."""
        self.endpoints = endpoints
        slots, names = [e.slot for e in endpoints], [e.name for e in endpoints]
        if slots == self.slots and names == self.names:
            return False
        self.slots, self.names = slots, names
        self.place = {slot: i for i, slot in enumerate(slots)}
        return True


class Costs:
    """Lists by slot. ``update`` first, then read."""

    def __init__(self, speeds: Speeds, lengths: Lengths) -> None:
        self.speeds = speeds
        self.lengths = lengths
        self.rows: list[Row] = []
        self.usual_rows: list[tuple[float, float]] = []
        """The same for an answer of ``usual`` tokens: in any case, and for each uncached token of its
        prompt.
        """
        self.usual = lengths.pool.of_a_token
        """Mean length of the answer that a token belongs to."""
        self.room: list[float] = []
        """KV tokens that can still be promised; infinite where nothing tells the KV cache's size. Only kept
        up to date while ``tight``.
        """
        self.level: list[float] = []
        """Cost of a usual request whose prompt is cached, smoothed: differences in it have lasted."""
        self.step_s: list[float] = []
        """A decode step as it is now."""
        self.queue_s: list[float] = []
        """Until the prompts in flight are computed."""
        self.token_s: list[float] = []
        """An uncached prompt token."""
        self.capacity: list[float] = []
        """Requests that it can have at once while its steps are as long as the pool's mean; smoothed."""
        self.others_share = 0.0
        """Of the requests in flight, those that did not come from us; smoothed."""
        self.shared = False
        """Many of the requests in flight are not ours: other routers send to these endpoints."""
        self.settled = False
        """What is known of speeds stands on enough samples."""
        self.tight = False
        """Some endpoint may be short of room."""
        self._names: list[str] = []
        self._seen: list[int] = []
        """``Load.changes`` of what the lists were computed from."""
        self._touched: list[Endpoint] = []
        """Those that have been sent something since."""
        self._known: list[tuple[float, float, float, float]] = []
        """Of a step: in any case, for each sequence, for each token of context; and of a prompt token."""
        self._mean = lengths.pool.mean
        self._requests = 0
        self._usual_prompt = 0.0
        self._usual_hold = 0.0
        self._overdue_s: list[float] = []
        """How long the oldest first output has been due: an endpoint that hangs is not waited for."""
        self._busy_s: list[float] = []
        """When it had a request last."""
        self._preemptions: list[float] = []
        self._full: list[bool] = []
        """It was short of room, whatever was believed, and has requests waiting since."""
        self._kv = KvSizes()
        self._kv_tokens: list[float] = []
        self._looks: dict[int, Look] = {}
        """By the first of the endpoints."""

    def update(self, endpoints: Sequence[Endpoint], now_s: float) -> Look:
        """Bring the lists up to date: for all ``endpoints`` a few times a second, else for those that have
        been sent something, and soon for those that got rid of something.
        """
        look = self._looks.get(endpoints[0].slot)
        if look is None or now_s - look.sampled_s >= SAMPLE_S:
            return self._sample(endpoints, now_s)
        if look.endpoints is endpoints and now_s - look.looked_s < LOOK_S:
            changed = self._touched
        else:
            if look.endpoints is not endpoints and look.arrange(endpoints) and self._new(look):
                return self._sample(endpoints, now_s)
            look.looked_s = now_s
            seen = self._seen
            changed = [e for e in endpoints if seen[e.slot] != e.load.changes]
        if changed:
            for endpoint in changed:
                self._compute(endpoint, now_s)
            self._touched.clear()
        return look

    def sent(self, endpoint: Endpoint, prompt_tokens: int, hold_tokens: int) -> None:
        """A request goes to ``endpoint`` that newly takes ``hold_tokens`` of KV at first."""
        self._touched.append(endpoint)
        if self._requests < MEMORY:
            self._requests += 1
        self._usual_prompt += (prompt_tokens - self._usual_prompt) / self._requests
        self._usual_hold += (hold_tokens - self._usual_hold) / self._requests

    def learned(self, endpoint: Endpoint, now_s: float) -> Learned | None:
        """What is known of the endpoint; None until a request could have gone there."""
        slot = endpoint.slot
        if slot >= len(self._names) or self._names[slot] != endpoint.name:
            return None
        self._compute(endpoint, now_s)
        load, speed = endpoint.load, self.speeds.by_slot[slot]
        room = self._room(endpoint, load.requests + load.others, self._generated(endpoint, now_s))
        base_s, sequence_s, context_s = speed.step
        return Learned(
            prefill_tok_s=1 / self.token_s[slot],
            step_rest_s=base_s + sequence_s,
            step_s=max(self.step_s[slot], base_s + sequence_s),
            step_sequence_s=sequence_s,
            step_context_token_s=context_s,
            siblings=speed.kind.endpoints - 1,
            factor=exp(speed.log_times),
            evidence_s=speed.kind.fit.weight_s,
            kv_room_tokens=None if room == inf else int(max(0.0, room)),
        )

    def _new(self, look: Look) -> bool:
        """Somebody is there who was not when samples were taken."""
        names, known = self._names, len(self._names)
        return any(s >= known or names[s] != n for s, n in zip(look.slots, look.names, strict=True))

    def _grow(self, slots: int) -> None:
        more = slots - len(self._seen)
        self._names += [""] * more
        self._seen += [0] * more
        for table in (self._known, self.rows):
            table += [(0.0, 0.0, 0.0, 0.0)] * more
        self.usual_rows += [(0.0, 0.0)] * more
        self._full += [False] * more
        for column in (
            self._kv_tokens,
            self._overdue_s,
            self._busy_s,
            self._preemptions,
            self.capacity,
            self.room,
            self.level,
            self.step_s,
            self.token_s,
            self.queue_s,
        ):
            column += [0.0] * more

    def _sample(self, endpoints: Sequence[Endpoint], now_s: float) -> Look:
        look = self._looks.setdefault(endpoints[0].slot, Look())
        look.arrange(endpoints)
        passed_s = now_s - look.sampled_s
        look.looked_s = look.sampled_s = now_s
        self._touched = [e for e in self._touched if e.slot not in look.place]
        self._grow(max(e.slot for e in endpoints) + 1)
        pool = self.lengths.pool
        self._mean, self.usual = pool.mean, pool.of_a_token
        each = self._usual_prompt + self.usual / 2
        contexts = [
            e.load.context_tokens + self._generated(e, now_s) + e.load.others * each for e in endpoints
        ]
        self.shared = self.others_share > ALONE_SHARE
        self.speeds.refresh(endpoints, now_s, contexts)
        self.settled = self.speeds.settled
        in_flight = sum([e.load.requests + e.load.others for e in endpoints])
        little = STARVED_SHARE * in_flight / len(endpoints)
        self.tight = True  # until all are known
        for endpoint, context in zip(endpoints, contexts, strict=True):
            self._kv.look(endpoint, context)
            slot = endpoint.slot
            self._kv_tokens[slot] = self._kv.tokens(endpoint) or inf
            token_s = self.token_s[slot] = self.speeds.token_s(slot)
            self._known[slot] = (*self.speeds.by_slot[slot].step, token_s)
            self._overdue_s[slot] = self._overdue(endpoint, now_s)
            self._note(endpoint, now_s, little)
            self._compute(endpoint, now_s)
        kept = exp(-min(MAX_STEP_S, passed_s) / LEVEL_MEMORY_S)
        length = self.usual
        least = inf
        for endpoint in endpoints:
            slot = endpoint.slot
            wait, _, output, context = self.rows[slot]
            level = wait + length * (output + self._usual_prompt * context)
            if self._names[slot] == endpoint.name:
                level += (self.level[slot] - level) * kept
            self._names[slot] = endpoint.name
            self.level[slot] = level
            least = min(least, self.room[slot])
        self._weigh(endpoints, in_flight, min(MAX_STEP_S, passed_s), each)
        look.starved = self._starved(endpoints, in_flight, now_s)
        look.tight = least < 4 * (self._usual_prompt + length)
        self.tight = any(each.tight for each in self._looks.values())
        return look

    def _weigh(self, endpoints: Sequence[Endpoint], in_flight: float, passed_s: float, each: float) -> None:
        """How many requests of ``each`` tokens every endpoint can take, and how many are not ours."""
        counts = [e.load.requests + e.load.others for e in endpoints]
        if not in_flight:
            for endpoint in endpoints:
                self.capacity[endpoint.slot] = self.capacity[endpoint.slot] or 1.0
            return
        others = sum([e.load.others for e in endpoints]) / in_flight
        self.others_share += (others - self.others_share) * passed_s / WEIGH_S
        mean_s = sum([self.step_s[e.slot] * n for e, n in zip(endpoints, counts, strict=True)]) / in_flight
        for endpoint in endpoints:
            slot = endpoint.slot
            base_s, sequence_s, context_s, _ = self._known[slot]
            fits = max(1.0, (mean_s - base_s) / (sequence_s + context_s * each))
            before = self.capacity[slot] or fits
            self.capacity[slot] = before + (fits - before) * passed_s / WEIGH_S

    def _note(self, endpoint: Endpoint, now_s: float, enough: float) -> None:
        """What the engine says of its room, and whether it has more than ``enough`` requests."""
        slot, metrics, load = endpoint.slot, endpoint.metrics, endpoint.load
        new = self._names[slot] != endpoint.name
        preempted = not new and metrics.preemptions > self._preemptions[slot]
        self._full[slot] = preempted or (self._full[slot] and not new and metrics.waiting > 0)
        self._preemptions[slot] = metrics.preemptions
        if new or load.requests + load.others > enough:
            self._busy_s[slot] = now_s

    def _starved(self, endpoints: Sequence[Endpoint], in_flight: float, now_s: float) -> int | None:
        """Who has got little for longest, if that is because it is believed to be slow: with nothing to do a
        request costs more there than where others are busy.
        """
        if in_flight < len(endpoints):
            return None
        busy_s, level = self._busy_s, self.level
        longest = min([e.slot for e in endpoints], key=busy_s.__getitem__)
        slow = level[longest] * len(endpoints) > SLOW * sum([level[e.slot] for e in endpoints])
        return longest if slow and now_s - busy_s[longest] >= STARVED_S else None

    def _overdue(self, endpoint: Endpoint, now_s: float) -> float:
        oldest = next(iter(endpoint.load.before_first.values()), None)
        if oldest is None or not (oldest.seen or endpoint.metrics.first_tokens):
            return 0.0
        slot = endpoint.slot
        due_s = OVERDUE * (self.step_s[slot] + oldest.ahead_tokens * self.token_s[slot])
        return max(0.0, now_s - oldest.sent_s - due_s)

    def _generated(self, endpoint: Endpoint, now_s: float) -> float:
        """Tokens that the requests in flight have been given so far, by their age."""
        load, step_s = endpoint.load, self.step_s[endpoint.slot]
        requests = load.requests
        if not requests or not step_s:
            return 0.0
        generated = (requests * now_s - load.since_sum_s) / step_s
        most = requests * self.usual / 2
        return generated if generated < most else most

    def _compute(self, endpoint: Endpoint, now_s: float) -> None:
        slot, load, usual = endpoint.slot, endpoint.load, self.usual
        self._seen[slot] = load.changes
        running: float = load.requests
        others = load.others
        base_s, sequence_s, context_s, token_s = self._known[slot]
        generated = self._generated(endpoint, now_s) if running else 0.0
        context = load.context_tokens + generated
        if others:
            running += others
            context += others * (self._usual_prompt + usual / 2)
        step_s = base_s + sequence_s * running + context_s * context
        queue_s = load.tokens * token_s + self._overdue_s[slot]
        self.step_s[slot], self.queue_s[slot] = step_s, queue_s
        delayed = OTHERS * running
        both = 1.0 + delayed / 2
        wait, token = step_s + queue_s * (1.0 + QUEUE * queue_s), token_s * (1.0 + delayed)
        output, each = step_s + (sequence_s + context_s * usual / 2) * both, context_s * both
        self.rows[slot] = wait, token, output, each
        self.usual_rows[slot] = wait + usual * output, token + usual * each
        if self.tight:
            self.room[slot] = self._room(endpoint, running, generated)

    def _room(self, endpoint: Endpoint, running: float, generated: float) -> float:
        slot = endpoint.slot
        if self._full[slot]:
            return -inf
        kv_tokens = self._kv_tokens[slot]
        if kv_tokens == inf:
            return inf
        metrics = endpoint.metrics
        unseen = max(0.0, running - metrics.running)
        growth = max(running * self._mean - generated, running * self._mean * LEAST_GROWTH)
        return (KV_SHARE - metrics.kv_usage) * kv_tokens - unseen * self._usual_hold - growth
