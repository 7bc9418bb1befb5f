"""Pointsman in front of two real vLLM servers, which are asked themselves what they did.

The tests run in this order; the last kills an engine and starts it again.
"""

from __future__ import annotations

import json
import random
import signal
import threading
import time
import urllib.error
import urllib.request
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from openai import BadRequestError, NotFoundError, OpenAI
from tests_vllm.servers import BLOCK_TOKENS, KV_BLOCKS, MODEL, Engine, Gateway, eventually, get

pytestmark = pytest.mark.timeout(900)  # an engine takes half a minute to start

Engines = tuple[Engine, Engine]

GROUPS = 10
QUESTIONS = 3
PREFIX_BYTES = 6000
QUESTION_BYTES = 200
CLIENTS = 3
PREFIX_HITS = "vllm:prefix_cache_hits_total"
PREFIX_QUERIES = "vllm:prefix_cache_queries_total"
RUNNING = "vllm:num_requests_running"


def client(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)


def post(url: str, body: object) -> tuple[int, dict[str, str], Any]:
    """Status, headers and JSON of a POST, whatever the status."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, dict(response.headers), json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, dict(error.headers), json.load(error)


def words(rng: random.Random, size: int) -> str:
    text = ""
    while len(text) < size:
        text += f"{rng.choice(('def', 'class', 'return', 'import', 'self', 'None'))} {rng.randrange(10_000)} "
    return text[:size]


def workload(seed: int) -> list[list[str]]:
    """Prompts by group; those of a group share their first PREFIX_BYTES, other seeds share nothing."""
    rng = random.Random(seed)
    prefixes = [words(rng, PREFIX_BYTES) for _ in range(GROUPS)]
    return [[prefix + words(rng, QUESTION_BYTES) for _ in range(QUESTIONS)] for prefix in prefixes]


class Served:
    """What became of a workload."""

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.endpoints: dict[int, set[str]] = defaultdict(set)
        """By group."""


def serve(url: str, groups: list[list[str]]) -> Served:
    """Send the workload: the questions of a group one after the other, CLIENTS groups at a time."""
    served = Served()
    lock = threading.Lock()

    def ask(number: int, prompts: list[str]) -> None:
        for prompt in prompts:
            body = {"model": MODEL, "prompt": prompt, "max_tokens": 4, "temperature": 0}
            status, headers, answer = post(f"{url}/v1/completions", body)
            assert status == 200, answer
            usage = answer["usage"]
            with lock:
                served.prompt_tokens += usage["prompt_tokens"]
                served.cached_tokens += usage["prompt_tokens_details"]["cached_tokens"]
                served.endpoints[number].add(headers.get("x-pointsman-endpoint", url))

    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(ask, range(len(groups)), groups))
    return served


def test_the_start_up_lines_tell_what_each_engine_is(engines: Engines, gateway: Gateway) -> None:
    assert "2 endpoints" in gateway.told
    for engine in engines:
        (line,) = [line for line in gateway.told.splitlines() if line.strip().startswith(engine.name)]
        for fact in (
            "engine: vllm",
            f"models: {MODEL}",
            f"block: {BLOCK_TOKENS} tokens",
            f"KV: {BLOCK_TOKENS * KV_BLOCKS:,} tokens",
            "prefix caching: on",
        ):
            assert fact in line
        assert "not told" not in line


def test_shared_prefixes_stick_to_the_engine_that_holds_them(
    engines: Engines, gateway: Gateway, figures: list[str]
) -> None:
    alone = serve(engines[0].url, workload(seed=1))
    assert alone.cached_tokens > 0
    before = [engine.metrics() for engine in engines]
    routed = serve(gateway.url, workload(seed=2))
    grown = [engine.metrics() - b for engine, b in zip(engines, before, strict=True)]
    hits = sum(g[PREFIX_HITS] for g in grown)
    queries = [g[PREFIX_QUERIES] for g in grown]

    share_alone = alone.cached_tokens / alone.prompt_tokens
    figures.append(
        f"{GROUPS} groups x {QUESTIONS} prompts: engines counted {hits:,.0f} of {sum(queries):,.0f} "
        f"prompt tokens as hits ({hits / sum(queries):.1%}); one engine alone {share_alone:.1%}; "
        f"queries by engine {queries[0]:,.0f} / {queries[1]:,.0f}"
    )
    assert sum(queries) == routed.prompt_tokens
    assert hits == routed.cached_tokens, "the engines' counters and what clients were told are the same"
    assert hits / sum(queries) >= 0.8 * share_alone
    assert min(queries) >= 0.9 * sum(queries) / GROUPS, "both engines got a group at least"
    assert all(len(endpoints) == 1 for endpoints in routed.endpoints.values()), routed.endpoints


def test_a_stream_arrives_in_pieces_with_its_usage(gateway: Gateway) -> None:
    stream = client(gateway.url).chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Say something long."}],
        max_tokens=24,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    chunks = list(stream)
    assert sum(bool(chunk.choices) for chunk in chunks) > 10
    assert chunks[-1].usage
    assert chunks[-1].usage.completion_tokens == 24


def test_a_client_that_leaves_frees_the_engine(
    engines: Engines, gateway: Gateway, figures: list[str]
) -> None:
    stream = client(gateway.url).completions.create(
        model=MODEL, prompt="Go on and on.", max_tokens=8000, stream=True, extra_body={"ignore_eos": True}
    )
    for _, _chunk in zip(range(5), stream, strict=False):
        pass
    assert sum(engine.metrics()[RUNNING] for engine in engines) == 1
    stream.close()
    seconds = eventually(
        lambda: not any(engine.metrics()[RUNNING] for engine in engines), 2.0, "no request runs"
    )
    figures.append(f"after a client left: no request running in {seconds:.2f} s")


def test_the_calls_of_an_engine_work_through_the_gateway(engines: Engines, gateway: Gateway) -> None:
    sdk = client(gateway.url)
    assert [model.id for model in sdk.models.list()] == [MODEL]
    completion = sdk.completions.create(model=MODEL, prompt="Hello", max_tokens=3)
    assert completion.usage
    assert completion.usage.completion_tokens == 3
    chat = sdk.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Hello"}], max_tokens=3
    )
    assert chat.choices[0].message.content is not None
    response = sdk.responses.create(model=MODEL, input="Hello", max_output_tokens=3)
    assert response.usage
    assert response.usage.output_tokens == 3
    question = {"model": MODEL, "prompt": "Hello there"}
    status, _, tokens = post(f"{gateway.url}/tokenize", question)
    assert status == 200
    assert tokens == post(f"{engines[0].url}/tokenize", question)[2]


def test_an_engines_own_errors_pass_through(engines: Engines, gateway: Gateway) -> None:
    too_long = {"model": MODEL, "prompt": "Hello", "max_tokens": 100_000}
    status, _, error = post(f"{gateway.url}/v1/completions", too_long)
    assert (status, error) == (400, post(f"{engines[0].url}/v1/completions", too_long)[2])
    with pytest.raises(BadRequestError):
        client(gateway.url).completions.create(model=MODEL, prompt="Hello", max_tokens=100_000)
    with pytest.raises(NotFoundError) as unknown:
        client(gateway.url).responses.retrieve("resp_that_nobody_made")
    assert "resp_that_nobody_made" in str(unknown.value)


def test_the_other_engine_answers_when_one_is_killed_and_it_is_used_again(
    engines: Engines, gateway: Gateway, figures: list[str]
) -> None:
    victim = engines[1]
    rng = random.Random(3)
    answered: list[tuple[float, int, str]] = []
    stop = threading.Event()
    started = time.monotonic()

    def load() -> None:
        while not stop.is_set():
            body = {"model": MODEL, "prompt": words(rng, 1200), "max_tokens": 16, "ignore_eos": True}
            status, headers, _ = post(f"{gateway.url}/v1/completions", body)
            answered.append((time.monotonic() - started, status, headers.get("x-pointsman-endpoint", "")))

    def used(engine: Engine, since: float) -> bool:
        return any(name == engine.name and at > since for at, _, name in list(answered))

    clients = [threading.Thread(target=load) for _ in range(4)]
    for thread in clients:
        thread.start()
    try:
        eventually(lambda: all(used(engine, 0) for engine in engines), 60, "both engines are used")
        killed = time.monotonic() - started
        victim.stop(signal.SIGKILL)
        eventually(lambda: used(engines[0], killed + 3), 60, "the other engine answers")
        assert gateway.endpoints()[victim.name]["reached"] is False
        get(f"{gateway.admin}/readyz")
        victim.start()
        victim.wait()
        back = time.monotonic() - started
        seconds = eventually(lambda: used(victim, back), 30, "the engine that came back is used")
    finally:
        stop.set()
        for thread in clients:
            thread.join()
    statuses = {status for _, status, _ in answered}
    during = [name for at, _, name in answered if killed + 1 < at < back]
    figures.append(
        f"killed under load: {len(answered)} requests, {sum(s == 200 for _, s, _ in answered)} answered 200, "
        f"{len(during)} of them while one engine was away; used again {seconds:.1f} s after it was back"
    )
    assert statuses == {200}, "none had begun to answer, so all of them could move"
    assert len(during) > 20
    assert set(during) == {engines[0].name}
