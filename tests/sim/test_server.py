"""What a simulated engine says over HTTP."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from pointsman.endpoints.metrics.mapping import PageReader
from pointsman.endpoints.metrics.vllm import ENGINE
from pointsman.sim.fleet import running_fleet
from pointsman.sim.server import SimulatedEngine
from pointsman.sim.spec import EngineSpec

Ask = Callable[..., Awaitable[Any]]
Connect = Callable[[str], Awaitable[Any]]
SPEED = 50
MODEL = "granite-4.1-8b"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def completion(prompt: object = "x" * 400, **more: object) -> dict[str, object]:
    return {"model": MODEL, "prompt": prompt, "max_tokens": 5} | more


def chat(text: str, **more: object) -> dict[str, object]:
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": 5} | more


async def test_a_completion_is_as_long_as_asked_and_counts_its_tokens(ask: Ask) -> None:
    async with running_fleet(speed=SPEED) as (engine,):
        first = (await ask(engine.url, COMPLETIONS, completion())).json()
        second = (await ask(engine.url, COMPLETIONS, completion())).json()
    assert first["object"] == "text_completion"
    assert first["choices"][0]["finish_reason"] == "length"
    assert len(first["choices"][0]["text"]) == 20
    assert first["usage"]["prompt_tokens"] == 100
    assert first["usage"]["completion_tokens"] == 5
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == 96
    assert second["choices"] == first["choices"]


async def test_a_stream_has_a_chunk_a_token_then_usage_then_done(ask: Ask) -> None:
    async with running_fleet(speed=SPEED) as (engine,):
        options = {"stream": True, "stream_options": {"include_usage": True}}
        whole = (await ask(engine.url, COMPLETIONS, completion())).json()
        answer = await ask(engine.url, COMPLETIONS, completion(**options))
    *pieces, usage, done = answer.events
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.complete
    assert done == b"[DONE]"
    assert usage["choices"] == []
    assert usage["usage"]["prompt_tokens_details"] == {"cached_tokens": 96}
    assert [p["choices"][0]["finish_reason"] for p in pieces] == [None] * 4 + ["length"]
    assert "".join(p["choices"][0]["text"] for p in pieces) == whole["choices"][0]["text"]


async def test_tokens_can_be_sent_several_at_once_the_first_alone(ask: Ask) -> None:
    async with running_fleet(speed=SPEED, tokens_per_chunk=10) as (engine,):
        answer = await ask(engine.url, COMPLETIONS, completion(stream=True, max_tokens=40))
    lengths = [len(event["choices"][0]["text"]) // 4 for event in answer.events[:-1]]
    assert lengths[0] == 1
    assert sum(lengths) == 40
    assert len(lengths) in (5, 6)
    assert max(lengths) == 10


async def test_speculative_decoding_sends_several_tokens_a_step(ask: Ask) -> None:
    spec = EngineSpec(num_speculative_tokens=3, kv_tokens=1600)
    async with running_fleet([spec], speed=SPEED) as (engine,):
        answer = await ask(engine.url, COMPLETIONS, completion(stream=True, max_tokens=300))
        plain = (await ask(engine.url, COMPLETIONS, completion(max_tokens=300))).json()
        longest = await ask(engine.url, COMPLETIONS, completion(max_tokens=1497))
        too_long = await ask(engine.url, COMPLETIONS, completion(max_tokens=1498))
        page = engine.metrics.page().decode()
    labels = '{engine="0",model_name="granite-4.1-8b"}'
    texts = [event["choices"][0]["text"] for event in answer.events[:-1]]
    lengths = [len(text) // 4 for text in texts]
    assert lengths[0] == 1
    assert set(lengths[1:-1]) == {1, 2, 3, 4}
    assert sum(lengths) == 300
    assert f"\nvllm:iteration_tokens_total_sum{labels} {float(3 * 100 + 300 + 300 + 1497 - 2 * 96)}\n" in page
    assert "".join(texts) == plain["choices"][0]["text"]
    assert (longest.status, too_long.status) == (200, 400)


async def test_a_chat_stream_begins_with_the_role(ask: Ask) -> None:
    async with running_fleet(speed=SPEED) as (engine,):
        answer = await ask(engine.url, CHAT, chat("hello", stream=True))
    deltas = [event["choices"][0]["delta"] for event in answer.events[:-1]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert all(set(delta) == {"content"} for delta in deltas[1:])


async def test_text_ids_and_tokenize_are_the_same_prompt(ask: Ask) -> None:
    async with running_fleet(speed=SPEED) as (engine,):
        text = "prefix caches are worth routing for, " * 20
        told = (await ask(engine.url, "/tokenize", {"prompt": text, "return_token_strs": True})).json()
        back = (await ask(engine.url, "/detokenize", {"tokens": told["tokens"]})).json()
        await ask(engine.url, COMPLETIONS, completion(text))
        by_ids = (
            await ask(engine.url, COMPLETIONS, completion(told["tokens"], return_token_ids=True))
        ).json()
    assert back == {"prompt": text}
    assert "".join(told["token_strs"]) == text
    assert told["count"] == len(told["tokens"]) == by_ids["usage"]["prompt_tokens"] == 185
    assert by_ids["usage"]["prompt_tokens_details"]["cached_tokens"] == 176
    assert by_ids["choices"][0]["prompt_token_ids"] == told["tokens"]
    assert len(by_ids["choices"][0]["token_ids"]) == 5


async def test_a_batch_answers_each_prompt_as_often_as_wanted(ask: Ask) -> None:
    async with running_fleet(speed=SPEED) as (engine,):
        body = completion(["a" * 8, "b" * 12, "c" * 16], n=2)
        answer = (await ask(engine.url, COMPLETIONS, body)).json()
        streamed = await ask(engine.url, COMPLETIONS, body | {"stream": True})
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3, 4, 5]
    assert len({choice["text"] for choice in answer["choices"]}) == 6
    assert answer["usage"]["prompt_tokens"] == 2 + 3 + 4
    assert answer["usage"]["completion_tokens"] == 30
    assert {event["choices"][0]["index"] for event in streamed.events[:-1]} == set(range(6))


async def test_the_next_turn_of_a_chat_finds_the_answer_of_the_last_one(ask: Ask) -> None:
    async with running_fleet(speed=SPEED) as (engine,):
        first = (await ask(engine.url, CHAT, chat("tell me", max_tokens=200))).json()
        history = [
            {"role": "user", "content": "tell me"},
            {"role": "assistant", "content": first["choices"][0]["message"]["content"]},
            {"role": "user", "content": "and more?"},
        ]
        second = (await ask(engine.url, CHAT, {"model": MODEL, "messages": history, "max_tokens": 1})).json()
    before = first["usage"]["prompt_tokens"] + 200
    assert before - 32 < second["usage"]["prompt_tokens_details"]["cached_tokens"] <= before


async def test_salt_adapter_tools_and_pictures_keep_prefixes_apart(ask: Ask) -> None:
    def picture(name: str) -> list[object]:
        return [
            {"type": "image_url", "image_url": {"url": f"data:{name}"}},
            {"type": "text", "text": "y" * 400},
        ]

    text = "x" * 400
    bodies = [
        chat(text),
        chat(text, cache_salt="tenant"),
        chat(text, model="adapter"),
        chat(text, tools=[{"type": "function"}]),
        chat("") | {"messages": [{"role": "user", "content": picture("cat")}]},
        chat("") | {"messages": [{"role": "user", "content": picture("dog")}]},
    ]
    async with running_fleet([EngineSpec(loras=("adapter",))], speed=SPEED) as (engine,):
        cached = [
            (await ask(engine.url, CHAT, body)).json()["usage"]["prompt_tokens_details"]["cached_tokens"]
            for body in bodies + bodies
        ]
    assert cached[:6] == [0] * 6
    assert min(cached[6:]) >= 96


@pytest.mark.parametrize(
    ("more", "tokens", "reason"),
    [
        ({}, 16, "length"),
        ({"max_tokens": 7}, 7, "length"),
        ({"max_tokens": 7, "ignore_eos": True, "sim_output_tokens": 3}, 7, "length"),
        ({"max_tokens": 7, "sim_output_tokens": 3}, 3, "stop"),
        ({"sim_output_tokens": 30, "max_tokens": 20}, 20, "length"),
    ],
)
async def test_how_long_an_answer_is(ask: Ask, more: dict[str, object], tokens: int, reason: str) -> None:
    async with running_fleet(speed=SPEED) as (engine,):
        answer = (await ask(engine.url, COMPLETIONS, {"model": MODEL, "prompt": "hello"} | more)).json()
    assert answer["usage"]["completion_tokens"] == tokens
    assert answer["choices"][0]["finish_reason"] == reason


async def test_a_chat_without_a_limit_ends_by_itself(ask: Ask) -> None:
    async with running_fleet([EngineSpec(output_tokens=9)], speed=SPEED) as (engine,):
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
        answer = (await ask(engine.url, CHAT, body)).json()
    assert answer["usage"]["completion_tokens"] == 9
    assert answer["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("path", "body", "status", "kind", "param", "says"),
    [
        (
            COMPLETIONS,
            completion(model="nope"),
            404,
            "NotFoundError",
            "model",
            "Valid aliases: granite-4.1-8b.",
        ),
        (COMPLETIONS, completion(max_tokens=2000), 400, "BadRequestError", "max_tokens", "max_tokens=2000"),
        (
            CHAT,
            chat("x", max_completion_tokens=2000),
            400,
            "BadRequestError",
            "max_completion_tokens",
            "2000",
        ),
        (
            COMPLETIONS,
            completion("x" * 4100),
            400,
            "BadRequestError",
            "input_tokens",
            "maximum context length",
        ),
        (COMPLETIONS, completion(max_tokens=0), 400, "BadRequestError", "max_tokens", "at least 1"),
        (COMPLETIONS, completion(""), 400, "BadRequestError", "prompt", "empty"),
        (COMPLETIONS, {"model": MODEL}, 400, "Bad Request", None, "`prompt`"),
        (COMPLETIONS, completion([1.5]), 400, "Bad Request", None, "`prompt`"),
        (COMPLETIONS, completion([1, -1]), 400, "Bad Request", None, "`prompt`"),
        (COMPLETIONS, b'{"model": ', 400, "Bad Request", None, "JSON decode error"),
        (COMPLETIONS, completion(max_tokens="many"), 400, "Bad Request", None, "max_tokens"),
        ("/v1/responses/resp_x", None, 404, "invalid_request_error", "response_id", "resp_x"),
        ("/v1/nothing", {}, 404, "NotFoundError", None, "Not Found"),
    ],
)
async def test_errors_have_vllms_shape(
    ask: Ask, path: str, body: object, status: int, kind: str, param: str | None, says: str
) -> None:
    async with running_fleet([EngineSpec(max_model_len=1000)], speed=SPEED) as (engine,):
        answer = await ask(engine.url, path, body)
        state = engine.state
    error = answer.json()["error"]
    assert (answer.status, error["code"], error["type"], error["param"]) == (status, status, kind, param)
    assert says in error["message"]
    assert (state.refused, state.served, state.running) == (1, 0, 0)


async def test_a_full_queue_is_503_without_retry_after(ask: Ask, connect: Connect) -> None:
    spec = EngineSpec(max_num_queued_reqs=2, max_num_seqs=1)
    async with running_fleet([spec]) as (engine,):
        for _ in range(2):
            (await connect(engine.url)).send(COMPLETIONS, completion(max_tokens=1000))
        await engine.until(lambda state: state.running + state.waiting == 2)
        assert (engine.state.running, engine.state.waiting) == (1, 1)
        answer = await ask(engine.url, COMPLETIONS, completion())
        page = (await ask(engine.url, "/metrics")).body.decode()
    assert answer.status == 503
    assert answer.json()["error"]["type"] == "Service Unavailable"
    assert "retry-after" not in answer.headers
    assert 'admission_rejections_total{model_name="granite-4.1-8b",reason="max_num_queued_reqs"} 1.0' in page


async def test_the_clients_request_id_becomes_the_answers(ask: Ask) -> None:
    async with running_fleet(speed=SPEED) as (engine,):
        answer = await ask(engine.url, CHAT, chat("x"), head="X-Request-Id: rid-1\r\n")
        assert engine.log[-1].id == "rid-1"
    assert answer.json()["id"] == "chatcmpl-rid-1"


async def test_models_are_listed_with_their_adapters_and_parents(ask: Ask) -> None:
    spec = EngineSpec(model=("base", "alias"), loras=("one",))
    async with running_fleet([spec], speed=SPEED) as (engine,):
        cards = (await ask(engine.url, "/v1/models")).json()["data"]
        await ask(engine.url, "/v1/load_lora_adapter", {"lora_name": "two", "lora_path": "/x"})
        both = (await ask(engine.url, "/v1/models")).json()["data"]
        served = await ask(engine.url, COMPLETIONS, completion(model="two"))
        await ask(engine.url, "/v1/unload_lora_adapter", {"lora_name": "two"})
        gone = await ask(engine.url, COMPLETIONS, completion(model="two"))
    assert [(c["id"], c["parent"]) for c in cards] == [("base", None), ("alias", None), ("one", "base")]
    assert [c["id"] for c in both] == ["base", "alias", "one", "two"]
    assert (served.status, served.json()["model"], gone.status) == (200, "two", 404)


@pytest.mark.parametrize("path", ["/health", "/ping", "/load", "/version", "/v1/models", "/metrics"])
async def test_the_small_pages_answer(ask: Ask, path: str) -> None:
    async with running_fleet(speed=SPEED) as (engine,):
        assert (await ask(engine.url, path)).status == 200
        assert (await ask(engine.url, path, method="PATCH")).status == 405


async def test_requests_on_one_connection_are_answered_in_order(connect: Connect) -> None:
    async with running_fleet(speed=SPEED) as (engine,):
        wire = await connect(engine.url)
        wire.send(COMPLETIONS, completion(max_tokens=50), head="x-request-id: slow\r\n")
        wire.send("/health", method="GET")
        wire.send(COMPLETIONS, completion(max_tokens=1), head="x-request-id: quick\r\nconnection: close\r\n")
        answer = await wire.rest()
    assert answer.count(b"HTTP/1.1 200 OK") == 3
    assert answer.index(b"cmpl-slow") < answer.index(b"content-length: 0") < answer.index(b"cmpl-quick")


async def test_a_body_may_wait_for_100_continue_and_come_in_chunks(connect: Connect) -> None:
    async with running_fleet(speed=SPEED) as (engine,):
        wire = await connect(engine.url)
        wire.writer.write(
            b"POST /tokenize HTTP/1.1\r\nexpect: 100-continue\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        assert await wire.until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        wire.writer.write(b'a\r\n{"prompt":\r\n9\r\n"abcdef"}\r\n0\r\n\r\n')
        assert b'"count":2' in await wire.until(b"}")


async def test_http_1_0_gets_a_stream_that_ends_with_the_connection(connect: Connect) -> None:
    async with running_fleet(speed=SPEED) as (engine,):
        wire = await connect(engine.url)
        body = b'{"prompt":"abcd","max_tokens":2,"stream":true}'
        wire.writer.write(
            b"POST %b HTTP/1.0\r\ncontent-length: %d\r\n\r\n%b" % (b"/v1/completions", len(body), body)
        )
        answer = await wire.rest()
    assert b"transfer-encoding" not in answer
    assert answer.endswith(b"\n\ndata: [DONE]\n\n")


async def test_what_is_no_http_is_400(connect: Connect) -> None:
    async with running_fleet(speed=SPEED) as (engine,):
        wire = await connect(engine.url)
        wire.writer.write(b"\x16\x03\x01 nonsense\r\n\r\n")
        assert (await wire.rest()).startswith(b"HTTP/1.1 400 Bad Request\r\n")


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_frees_the_engine(connect: Connect, stream: bool) -> None:
    async with running_fleet() as (engine,):
        wire = await connect(engine.url)
        wire.send(COMPLETIONS, completion(max_tokens=10_000, stream=stream))
        await engine.until(lambda state: state.running + state.waiting == 1)
        assert engine.state.kv_usage > 0
        wire.close()
        await engine.until(lambda state: state.aborted == 1)
        state = engine.state
        page = engine.metrics.page().decode()
    assert (state.running, state.waiting, state.kv_usage, state.served) == (0, 0, 0.0, 0)
    assert 'finished_reason="abort",model_name="granite-4.1-8b"} 1.0' in page
    assert engine.log[-1].ending == "aborted"


async def test_time_runs_as_fast_as_told_and_is_reported_in_engine_seconds(ask: Ask) -> None:
    loop = asyncio.get_running_loop()
    async with running_fleet(speed=100) as (engine,):
        began_s = loop.time()
        await ask(engine.url, COMPLETIONS, completion(max_tokens=1000))
        wall_s = loop.time() - began_s
        record = engine.log[-1]
        page = engine.metrics.page().decode()
    assert record.duration_s == pytest.approx(7.83e-3 * 1000, rel=0.02)
    assert record.duration_s / 100 <= wall_s + 0.002
    assert (
        'vllm:e2e_request_latency_seconds_bucket{engine="0",le="5.0",model_name="granite-4.1-8b"} 0.0' in page
    )
    assert (
        'vllm:e2e_request_latency_seconds_bucket{engine="0",le="10.0",model_name="granite-4.1-8b"} 1.0'
        in page
    )


def page_reader(engine: SimulatedEngine) -> tuple[Any, str]:
    page = engine.metrics.page() + engine.loras_line()
    return PageReader(ENGINE).read(page, 1.0)[0], page.decode()


async def test_the_metrics_page_says_what_the_engine_does(connect: Connect, ask: Ask) -> None:
    spec = EngineSpec(model="m", max_num_seqs=1, loras=("a", "b"), kv_tokens=3200)
    async with running_fleet([spec]) as (engine,):
        await ask(engine.url, COMPLETIONS, completion(model="a", max_tokens=1))
        for model in ("a", "b"):
            (await connect(engine.url)).send(COMPLETIONS, completion(model=model, max_tokens=2000))
            await engine.until(lambda state: state.log_length == 1 and state.running + state.waiting > 0)
        await engine.until(lambda state: state.running == 1 and state.waiting == 1)
        metrics, page = page_reader(engine)
    assert (metrics.running, metrics.waiting) == (1, 1)
    assert (metrics.block_tokens, metrics.kv_blocks, metrics.prefix_caching) == (16, 200, True)
    assert metrics.kv_usage == pytest.approx(7 / 200)
    assert (metrics.prefix_queries, metrics.prefix_hits) == (200, 96)
    assert (metrics.loras_active, metrics.loras_waiting, metrics.max_loras) == ({"a"}, {"b"}, 4)
    for line in (
        'vllm:prompt_tokens_total{engine="0",model_name="m"} 100.0',
        'vllm:generation_tokens_total{engine="0",model_name="m"} 1.0',
        'vllm:request_success_total{engine="0",finished_reason="length",model_name="m"} 1.0',
        'vllm:time_to_first_token_seconds_count{engine="0",model_name="m"} 1.0',
        'vllm:request_prompt_tokens_sum{engine="0",model_name="m"} 100.0',
    ):
        assert f"\n{line}\n" in page


async def test_metrics_and_state_are_of_the_moment_in_the_middle_of_a_long_run(
    connect: Connect, ask: Ask
) -> None:
    async with running_fleet(speed=100) as (engine,):
        (await connect(engine.url)).send(COMPLETIONS, completion(max_tokens=100_000))
        tokens = 0.0
        while tokens < 10:
            page = (await ask(engine.url, "/metrics")).body.decode()
            tokens = float(re.findall(r"^vllm:generation_tokens_total\{.*\} (.*)$", page, re.MULTILINE)[0])
        due_s = engine.engine.due_s
        state = (await ask(engine.url, "/sim/state")).json()
        assert engine.engine.due_s == due_s
    assert tokens < 50_000
    assert due_s > 800
    assert state["kv_usage"] * 363_000 >= 100 + tokens


async def test_a_request_id_and_model_with_quotes_stay_json(ask: Ask) -> None:
    async with running_fleet([EngineSpec(model='odd"name%s')], speed=SPEED) as (engine,):
        body = completion(model='odd"name%s', stream=True)
        answer = await ask(engine.url, COMPLETIONS, body, head='x-request-id: a"b\\c\r\n')
        page = engine.metrics.page().decode()
    assert answer.events[0]["id"] == 'cmpl-a"b\\c'
    assert answer.events[0]["model"] == 'odd"name%s'
    assert '\nvllm:num_requests_running{engine="0",model_name="odd\\"name%s"} 0.0\n' in page


async def test_reset_prefix_cache_forgets(ask: Ask) -> None:
    async with running_fleet(speed=SPEED) as (engine,):
        await ask(engine.url, COMPLETIONS, completion())
        assert engine.state.cached_blocks == 6
        await ask(engine.url, "/reset_prefix_cache", b"")
        assert engine.state.cached_blocks == 0
        answer = (await ask(engine.url, COMPLETIONS, completion())).json()
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


async def test_caching_can_be_off(ask: Ask) -> None:
    async with running_fleet([EngineSpec(enable_prefix_caching=False)], speed=SPEED) as (engine,):
        for _ in range(2):
            answer = (await ask(engine.url, COMPLETIONS, completion(max_tokens=50))).json()
        assert engine.state.cached_blocks == 0
        assert page_reader(engine)[0].prefix_caching is False
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


async def test_state_log_and_lag_are_there_for_every_engine_of_the_fleet(ask: Ask) -> None:
    async with running_fleet(
        [EngineSpec(name="a", labels={"zone": "z"}), EngineSpec(name="b")], speed=SPEED
    ) as (a, b):
        await ask(a.url, COMPLETIONS, completion())
        through_b = (await ask(b.url, "/sim/state/a")).json()
        own = (await ask(a.url, "/sim/state")).json()
        log = (await ask(b.url, "/sim/log/a")).json()
        lag = (await ask(a.url, "/sim/lag")).json()
        cleared = (await ask(a.url, "/sim/lag", method="DELETE")).json()
        missing = await ask(a.url, "/sim/state/c")
    assert through_b["name"] == own["name"] == "a"
    assert (own["served"], own["prompt_tokens"], own["output_tokens"], own["log_length"]) == (1, 100, 5, 1)
    assert own["labels"] == {"zone": "z"}
    assert log[0]["cached_tokens"] == 0
    assert lag["runs"] > 0
    assert cleared["runs"] == 0
    assert missing.status == 404
