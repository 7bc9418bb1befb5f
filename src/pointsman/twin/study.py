"""The case study's measured stages: what a pool of real servers did under inference-perf, a row a stage.

``data/stages.csv`` holds public runs of praveingk/llmd-benchmarking-nxtgen (llm-d against a Kubernetes
service on H100-NVL, MI325X and Gaudi3, one vLLM a card); any file with the same columns can be read.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Literal

import msgspec

from pointsman.errors import SettingsError

ACCELERATORS = {"n_nv": "h100-nvl", "n_amd": "mi325x", "n_gaudi": "gaudi3"}
"""Columns that count endpoints, and what these are called in ``sim.profiles``."""

_SHORT = {"h100-nvl": "nv", "mi325x": "amd", "gaudi3": "gaudi"}
_REFUSED_WITHIN_S = 1.0
_TIMED_OUT_S = 299.0


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One stage of one run; None where the file has nothing. Names and units are the columns'."""

    experiment: str
    run_id: str
    n_nv: int = 0
    n_amd: int = 0
    n_gaudi: int = 0
    model: str
    router: Literal["llmd", "k8s"]
    scorer: str | None = None
    note: str | None = None
    num_groups: int
    prompts_per_group: int
    system_prompt_len: int
    question_len: int
    output_len: int
    stage: int
    """0 is the warm-up."""
    target_rate: float
    stage_duration_s: float
    send_duration_s: float
    makespan_s: float
    n_requests: int
    n_success: int
    n_failures: int
    output_tok_s: float
    """As the load generator counted them, see ``answered_tok_s``."""
    ttft_mean_s: float
    ttft_median_s: float
    ttft_p90_s: float
    ttft_p99_s: float
    tpot_mean_s: float
    tpot_median_s: float
    itl_median_s: float | None = None
    e2e_mean_s: float
    e2e_p99_s: float
    prompt_len_mean: float
    """Tokens of a prompt as the servers' tokenizer counts them: more than was asked for."""
    output_len_median: float
    output_len_max: float | None = None
    fail_latency_median_s: float | None = None

    @property
    def answered_tok_s(self) -> float:
        """Output tokens a second, each answered request counted with the length it asked for.

        ``output_tok_s`` counts prompt and answer of some requests (up to 1.8% of a stage) as output: its
        longest answers have prompt + output tokens and took no longer than the others.
        """
        return self.n_success * self.output_len / self.makespan_s

    @property
    def failure(self) -> str:
        """What most of its failures were; empty when there were none."""
        if not self.n_failures:
            return ""
        after_s = self.fail_latency_median_s
        if after_s is None:
            return "failed"
        if after_s <= _REFUSED_WITHIN_S:
            return "refused"
        return "timed out" if after_s >= _TIMED_OUT_S else "failed"


class Run(msgspec.Struct, frozen=True):
    """The stages of one run in order: one pool, one model, one router, caches kept from stage to stage."""

    rows: tuple[Row, ...]
    fleet: tuple[tuple[str, int], ...]
    """Accelerators and how many endpoints of each."""

    @property
    def experiment(self) -> str:
        return self.rows[0].experiment

    @property
    def run_id(self) -> str:
        return self.rows[0].run_id

    @property
    def model(self) -> str:
        return self.rows[0].model

    @property
    def router(self) -> str:
        return self.rows[0].router

    @property
    def endpoints(self) -> int:
        return sum(count for _, count in self.fleet)

    @property
    def single_vendor(self) -> bool:
        return len(self.fleet) == 1

    @property
    def pool(self) -> str:
        """``nv``, ``amd``, ``gaudi``, two of them with a plus, or ``3vendor``."""
        names = [_SHORT.get(name, name) for name, _ in self.fleet]
        return "+".join(names) if len(names) < len(ACCELERATORS) else "3vendor"


def load_study(path: str | None = None) -> tuple[Run, ...]:
    """The runs of a stages CSV, the study's own by default; ``SettingsError`` when a row is wrong."""
    rows: dict[tuple[str, str], list[Row]] = {}
    for row in _rows(path):
        rows.setdefault((row.experiment, row.run_id), []).append(row)
    return tuple(Run(tuple(sorted(run, key=lambda r: r.stage)), _fleet(run[0])) for run in rows.values())


def find_runs(runs: Sequence[Run], pool: str = "", model: str = "") -> tuple[Run, ...]:
    """The runs of a pool, an experiment or a run id, several with commas, and of a model; ``SettingsError``
    when there are none.
    """
    wanted = set(pool.split(","))
    found = tuple(
        run
        for run in runs
        if (not pool or wanted & {run.pool, run.experiment, run.run_id}) and model in ("", run.model)
    )
    if not found:
        pools = ", ".join(dict.fromkeys(f"{run.pool} ({run.model})" for run in runs))
        raise SettingsError(f"--pool, --model: no run of {pool or 'any pool'} {model}; there are {pools}")
    return found


def _fleet(row: Row) -> tuple[tuple[str, int], ...]:
    counts = ((name, int(getattr(row, column))) for column, name in ACCELERATORS.items())
    return tuple((name, count) for name, count in counts if count)


def _rows(path: str | None) -> list[Row]:
    name = path or "stages.csv"
    try:
        if path is None:
            text = resources.files("pointsman.twin").joinpath("data/stages.csv").read_text(encoding="utf-8")
        else:
            text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise SettingsError(f"stages: cannot read {name}: {exc}") from exc
    found = []
    for number, cells in enumerate(csv.DictReader(text.splitlines()), start=2):
        try:
            found.append(msgspec.convert({k: v for k, v in cells.items() if v}, Row, strict=False))
        except msgspec.ValidationError as exc:
            raise SettingsError(f"stages: {name}, line {number}: {exc}") from exc
    if not found:
        raise SettingsError(f"stages: {name}: no rows; a header and a line a stage are expected")
    return found
