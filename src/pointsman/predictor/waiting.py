"""How long a request waits at an engine that has no place for it: for a sequence or for KV blocks to get
free.
"""

from __future__ import annotations

from pointsman.types import Endpoint

FOLD_S = 0.1
MEMORY_S = 5.0
"""In which what was seen of a queue counts for half."""
GROWTH = 1.02
MAX_GAP_S = 1.0
"""After a longer pause between two looks a queue is a new one."""


class Queue:
    """One engine's, since it was last empty: so many of our streams got their first token in that time."""

    __slots__ = ("at_s", "begun", "first_outputs", "name", "running", "seconds")

    def __init__(self, endpoint: Endpoint, now_s: float) -> None:
        self.name = endpoint.name
        self.at_s = now_s
        self.first_outputs = endpoint.load.first_outputs
        self.running = endpoint.metrics.running
        self.seconds = self.begun = 0.0

    def is_over(self, endpoint: Endpoint, now_s: float) -> bool:
        """There was room, or nobody has looked for a while, or it is another endpoint's."""
        grown = endpoint.metrics.running > self.running * GROWTH
        return grown or now_s - self.at_s > MAX_GAP_S or self.name != endpoint.name

    def fold(self, endpoint: Endpoint, passed_s: float) -> None:
        kept = 0.5 ** (passed_s / MEMORY_S)
        self.seconds = self.seconds * kept + passed_s
        self.begun = self.begun * kept + endpoint.load.first_outputs - self.first_outputs
        self.first_outputs = endpoint.load.first_outputs
        self.at_s += passed_s


class Waiting:
    """Little's law: requests in the engine's queue, divided by how many of them are begun in a second.

    Prompts that wait for others to be computed are in the same queue. So it counts only while the engine runs
    no more sequences than when it came up, and once it has been there for longer than these prompts take.
    """

    def __init__(self) -> None:
        self._by_slot: dict[int, Queue] = {}

    def seconds(self, endpoint: Endpoint, now_s: float, prefill_s: float) -> float:
        """What a new request would wait there, where the prompts before it take ``prefill_s``; 0.0 where that
        explains the queue, without one, and without streams that tell how it moves.
        """
        waiting, load, slot = endpoint.metrics.waiting, endpoint.load, endpoint.slot
        if not waiting or not load.requests or not load.first_outputs:
            if self._by_slot:
                self._by_slot.pop(slot, None)
            return 0.0
        queue = self._by_slot.get(slot)
        if queue is None or queue.is_over(endpoint, now_s):
            self._by_slot[slot] = Queue(endpoint, now_s)
            return 0.0
        if now_s - queue.at_s >= FOLD_S:
            queue.fold(endpoint, now_s - queue.at_s)
        if queue.seconds <= prefill_s:
            return 0.0
        # As if those there were begun now: nobody knows yet how long a queue lasts that has just come up.
        return waiting * queue.seconds / (queue.begun + waiting)
