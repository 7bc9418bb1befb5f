"""What inference-perf left in its report folder, as a run of the study's form.

Read are ``stage_N_lifecycle_metrics.json`` and, for prompts and stages, the ``config.yaml`` beside them
(data type shared_prefix).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from pointsman.config import convert, read_yaml
from pointsman.errors import SettingsError
from pointsman.twin.study import Row, Run

_STAGE = re.compile(r"stage_(\d+)_lifecycle_metrics\.json")


class _Spread(msgspec.Struct, frozen=True):
    mean: float
    median: float
    p90: float
    p99: float
    max: float


class _Latency(msgspec.Struct, frozen=True):
    request_latency: _Spread
    time_per_output_token: _Spread | None = None
    time_to_first_token: _Spread | None = None


class _Throughput(msgspec.Struct, frozen=True):
    output_tokens_per_sec: float
    requests_per_sec: float


class _Successes(msgspec.Struct, frozen=True):
    count: int
    latency: _Latency
    throughput: _Throughput
    prompt_len: _Spread
    output_len: _Spread


class _Failures(msgspec.Struct, frozen=True):
    count: int
    request_latency: _Spread | None = None


class _LoadSummary(msgspec.Struct, frozen=True):
    count: int
    send_duration: float
    requested_rate: float


class _Stage(msgspec.Struct, frozen=True):
    load_summary: _LoadSummary
    successes: _Successes
    failures: _Failures


Tokens = Annotated[int, Meta(ge=0)]


class _SharedPrefix(msgspec.Struct, frozen=True):
    system_prompt_len: Tokens
    question_len: Tokens
    output_len: Tokens
    num_groups: int | None = None
    num_prompts_per_group: int | None = None
    num_unique_system_prompts: int | None = None
    num_users_per_system_prompt: int | None = None


class _Data(msgspec.Struct, frozen=True):
    shared_prefix: _SharedPrefix


class _LoadStage(msgspec.Struct, frozen=True):
    duration: float = 0.0


class _Load(msgspec.Struct, frozen=True):
    stages: tuple[_LoadStage, ...] = ()


class _Server(msgspec.Struct, frozen=True):
    model_name: str = ""


class _Config(msgspec.Struct, frozen=True):
    data: _Data
    load: _Load = _Load()
    server: _Server = _Server()


def read_results(
    folder: str, accelerator: str, endpoints: int, *, router: Literal["llmd", "k8s"], model: str = ""
) -> Run:
    """The run in ``folder``, made with so many servers alike; ``SettingsError`` when something is missing.

    ``router``: ``k8s`` when requests were spread at random, ``llmd`` behind llm-d's router.
    """
    path = Path(folder)
    config = convert(read_yaml(path / "config.yaml"), _Config, f"{folder}/config.yaml")
    files = {
        int(found[1]): file for file in path.glob("stage_*.json") if (found := _STAGE.fullmatch(file.name))
    }
    if not files:
        raise SettingsError(f"--results: {folder}: there is no stage_0_lifecycle_metrics.json")
    model = model or config.server.model_name.rpartition("/")[2]
    rows = [_row(path.name, n, _read(files[n]), config, router, model) for n in sorted(files)]
    return Run(tuple(rows), ((accelerator, endpoints),))


def _read(path: Path) -> _Stage:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Stage)
    except (OSError, msgspec.DecodeError) as exc:
        raise SettingsError(f"--results: {path}: {exc}") from exc


def _row(
    name: str, number: int, stage: _Stage, config: _Config, router: Literal["llmd", "k8s"], model: str
) -> Row:
    load, done, data = stage.load_summary, stage.successes, config.data.shared_prefix
    ttft, tpot = done.latency.time_to_first_token, done.latency.time_per_output_token
    groups = data.num_groups or data.num_unique_system_prompts
    per_group = data.num_prompts_per_group or data.num_users_per_system_prompt
    if ttft is None or tpot is None:
        raise SettingsError(f"--results: {name}: no time to first token; run inference-perf with streaming")
    if groups is None or per_group is None:
        raise SettingsError(f"--results: {name}/config.yaml: data.shared_prefix.num_groups is missing")
    stages = config.load.stages
    failed = stage.failures
    return Row(
        experiment=name,
        run_id=name,
        model=model,
        router=router,
        num_groups=groups,
        prompts_per_group=per_group,
        system_prompt_len=data.system_prompt_len,
        question_len=data.question_len,
        output_len=data.output_len,
        stage=number,
        target_rate=load.requested_rate,
        stage_duration_s=stages[number].duration if number < len(stages) else load.send_duration,
        send_duration_s=load.send_duration,
        makespan_s=done.count / done.throughput.requests_per_sec,
        n_requests=load.count,
        n_success=done.count,
        n_failures=failed.count,
        output_tok_s=done.throughput.output_tokens_per_sec,
        ttft_mean_s=ttft.mean,
        ttft_median_s=ttft.median,
        ttft_p90_s=ttft.p90,
        ttft_p99_s=ttft.p99,
        tpot_mean_s=tpot.mean,
        tpot_median_s=tpot.median,
        e2e_mean_s=done.latency.request_latency.mean,
        e2e_p99_s=done.latency.request_latency.p99,
        prompt_len_mean=done.prompt_len.mean,
        output_len_median=done.output_len.median,
        output_len_max=done.output_len.max,
        fail_latency_median_s=None if failed.request_latency is None else failed.request_latency.median,
    )
