"""What one request may expect of each endpoint, by what is known of their speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from pointsman.predictor.costs import Costs
from pointsman.predictor.waiting import Waiting
from pointsman.types import Endpoint, Prediction


class Latency(msgspec.Struct, frozen=True, gc=False):
    """A request at one endpoint: what is predicted, and how far that is from what was promised to its client.

    Headroom is the promise less the prediction, as if a promise that was not given were 0.
    """

    ttft_s: float
    tpot_s: float
    """0.0 where it does not matter; then its headroom is 0.0, too."""
    ttft_headroom_s: float
    tpot_headroom_s: float
    kept: bool
    """Something was promised, and all of it is expected to hold here."""


class Latencies:
    """Of requests at endpoints that ``costs`` knows."""

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        self._waiting = Waiting()

    def expected(
        self,
        endpoints: Sequence[Endpoint],
        now_s: float,
        prompt_tokens: int,
        cached: Mapping[int, int],
        length: float,
    ) -> Sequence[Prediction]:
        """A request's times at each of ``endpoints``, for which ``costs`` has just been brought up to date.
        ``cached`` are the prompt's tokens in cache by slot, ``length`` the answer's expected tokens.

        The steps after the first token are as long as they get with this request among them, half done.
        """
        costs, waiting = self._costs, self._waiting
        queue_s, token_s, step_s, speeds = costs.queue_s, costs.token_s, costs.step_s, costs.speeds.by_slot
        context = prompt_tokens + length / 2
        found = []
        for endpoint in endpoints:
            slot = endpoint.slot
            _, sequence_s, context_s = speeds[slot].step
            step = step_s[slot]
            wait_s = queue_s[slot]
            wait_s = max(wait_s, waiting.seconds(endpoint, now_s, wait_s))
            prefill_s = step + (prompt_tokens - cached.get(slot, 0)) * token_s[slot]
            found.append(Prediction(wait_s, prefill_s, step + sequence_s + context_s * context))
        return found
