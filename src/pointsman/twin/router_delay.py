"""What the measured llm-d router took, beyond deciding: fitted on its single-vendor runs alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean

from msgspec import structs

from pointsman.errors import SettingsError
from pointsman.twin.casestudy import LLM_D as LLM_D_POLICY
from pointsman.twin.compare import Task, simulate
from pointsman.twin.gateway import RouterCost
from pointsman.twin.policies import policy
from pointsman.twin.replay import as_sent, scenario_of
from pointsman.twin.study import Run

LLM_D = RouterCost(delay_s=0.04, stream_s=0.0025)
"""Of llm-d v0.7 and v0.8 as deployed in the study. TTFT there grew by 1.5 to 5 ms for each stream that ran,
almost whatever the tokens a second: 2.8 s at 1,312 streams and 5,000 tok/s (Gaudi3), 1.5 s at 912 and 20,000
(H100-NVL). So it is a cost of open streams, not of tokens, and ``chunk_s`` stays 0.
"""


def fit(
    runs: Sequence[Run],
    *,
    start: RouterCost = LLM_D,
    rounds: int = 4,
    on_try: Callable[[RouterCost, float], None] = lambda cost, factor: None,
) -> tuple[RouterCost, float]:
    """The cost with the least typical factor between simulated and measured mean TTFT, and that factor.

    Only single-vendor runs are looked at; ``SettingsError`` when there are none. A search over ``delay_s``
    and ``stream_s``, one after the other.
    """
    single = [run for run in runs if run.router == "llmd" and run.single_vendor]
    if not single:
        raise SettingsError("--stages, --pool: no single-vendor run behind llm-d's router")

    def factor(cost: RouterCost) -> float:
        found = math.exp(fmean(error for run in single for error in _errors(run, cost)))
        on_try(cost, found)
        return found

    best, least = start, factor(start)
    step = 1.5
    for _ in range(rounds):
        for field in ("stream_s", "delay_s"):
            for by in (step, 1 / step):
                cost = structs.replace(best, **{field: getattr(best, field) * by})
                found = factor(cost)
                if found < least:
                    best, least = cost, found
                    break
        step = math.sqrt(step)
    return best, least


def _errors(run: Run, cost: RouterCost) -> Iterator[float]:
    scenario = scenario_of(run, as_sent(run.rows, 0), router=cost)
    replayed = simulate(Task(scenario=scenario, policy=policy(LLM_D_POLICY), seed=0))
    for row, stage in zip(run.rows, replayed.stages, strict=True):
        if stage.ttft is not None:
            yield abs(math.log(stage.ttft.mean / row.ttft_mean_s))
