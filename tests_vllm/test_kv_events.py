"""Two real engines that tell of their caches, with blocks of 32 and of 64 tokens: what is predicted to be
cached is what they report, to the token.

The caches are small, so blocks are evicted all the time. One engine publishes where the router connects to
(ipc), the other connects to the router. The tests run in this order; each router is a new one and learns what
the engines hold from their replays. The last test kills an engine and starts it again.
"""

from __future__ import annotations

import json
import random
import signal
import socket
import subprocess
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from tests_vllm.servers import HOME, MODEL, Engine, Gateway, eventually, get

pytestmark = pytest.mark.timeout(900)

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
CONTEXT = 2048
CACHE_TOKENS = 6144
"""Of each engine: some eight prompts."""
BLOCKS = (32, 64)
ADAPTERS = ("lora-a", "lora-b")
SALTS = ("tenant-1", "tenant-2")
QUIET_S = 0.06
"""Without a message, so long after an answer there is none to come: the last comes 18 ms after it."""

Fields = dict[str, Any]
Engines = tuple[Engine, Engine]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


class Pool:
    """Both engines, and where the second one looks for its subscriber."""

    def __init__(self, folder: Path) -> None:
        self.bind = f"tcp://127.0.0.1:{free_port()}"
        python = HOME / ".venv" / "bin" / "python"
        adapters = []
        for seed, name in enumerate(ADAPTERS):
            command = [python, Path(__file__).with_name("lora.py"), folder / name, str(seed)]
            subprocess.run(command, check=True)
            adapters.append(f"{name}={folder / name}")
        self.engines: Engines = (
            self._engine(0, f"ipc://{folder}/events", adapters),
            self._engine(1, self.bind, adapters),
        )

    def _engine(self, number: int, address: str, adapters: Sequence[str]) -> Engine:
        tokens = BLOCKS[number]
        engine = Engine(
            f"events-{number}",
            *("--block-size", str(tokens), "--num-gpu-blocks-override", str(CACHE_TOKENS // tokens)),
            *("--max-model-len", str(CONTEXT), "--enable-lora", "--max-lora-rank", "8", "--max-loras", "2"),
            *("--lora-modules", *adapters),
            variables={"VLLM_SERVER_DEV_MODE": "1"},
        )
        events = {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": address,
            "replay_endpoint": f"tcp://127.0.0.1:{free_port()}",
            "topic": f"kv@{engine.name}@{MODEL}",
        }
        return engine.with_options("--kv-events-config", json.dumps(events))


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory, figures: list[str]) -> Iterator[Pool]:
    made = Pool(tmp_path_factory.mktemp("kv"))
    try:
        for engine in made.engines:
            engine.start()
        seconds = max(engine.wait() for engine in made.engines)
        figures.append(f"two engines with KV events up in {seconds:.0f} s")
        yield made
    finally:
        for engine in made.engines:
            engine.stop()


class Router:
    """A gateway in front of both, asked one request after the other."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._numbers = count(1)
        self.last: dict[str, Any] = {}
        """The record of the latest decision."""
        self.exact: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.cached_tokens = 0

    def sources(self) -> list[dict[str, Any]]:
        page = json.loads(get(f"{self._gateway.admin}/cache"))
        return [source for endpoint in page["endpoints"] for source in endpoint["events"]]

    def settle(self) -> None:
        """All that the engines have to tell so far has come."""

        def quiet() -> bool:
            sources = self.sources()
            before = [source["frames"] for source in sources]
            time.sleep(QUIET_S)
            after = self.sources()
            behind = [s for s in after if s["connected"] and not s["live"]]
            return before == [source["frames"] for source in after] and not behind

        eventually(quiet, 30, "the engines are quiet")

    def knows(self, blocks: int = 1) -> None:
        """Both engines have told of that many blocks."""
        eventually(
            lambda: len(self.sources()) == 2 and all(s["blocks"] >= blocks for s in self.sources()),
            30,
            f"both engines tell of blocks: {self.sources()}",
        )
        self.settle()

    def serves(self, engine: Engine) -> bool:
        """Requests may go there."""
        found = self._gateway.endpoints()[engine.name]
        return bool(found["reached"]) and found["breaker"] != "open"

    def blocks(self, engine: Engine) -> int:
        """That the index has of it."""
        page = json.loads(get(f"{self._gateway.admin}/cache"))
        [found] = [e for e in page["endpoints"] if e["name"] == engine.name]
        return int(found["index"]["events"]["blocks"])

    def only(self, engine: Engine | None, engines: Engines) -> None:
        """Requests go to this engine, or to any."""
        for each in engines:
            action = "resume" if engine in (None, each) else "drain"
            post(f"{self._gateway.admin}/endpoints/{each.name}/{action}", {})

    def send(self, path: str, fields: Fields) -> tuple[str, dict[str, Any]]:
        """The request's id, and the answer."""
        request_id = f"r{next(self._numbers)}"
        return request_id, post(
            self._gateway.url + path, {"model": MODEL, "temperature": 0, **fields}, request_id
        )

    def record(self, request_id: str) -> dict[str, Any]:
        """Of its decision."""
        page = f"{self._gateway.admin}/decisions?limit=1&request_id={request_id}"
        [found] = json.loads(get(page))["decisions"]
        return dict(found)

    def compare(self, kind: str, request_id: str, answer: Mapping[str, Any]) -> None:
        """Note whether what was predicted is what the engine reports."""
        record = self.last = self.record(request_id)
        usage = answer["usage"]
        reported = usage["prompt_tokens_details"]["cached_tokens"]
        self.cached_tokens += reported
        said = (record["matched_by"], record["matched_tokens"], record["prompt_tokens"])
        if said == ("events", reported, usage["prompt_tokens"]):
            self.exact[kind] += 1
        else:
            self.wrong.append(
                f"{kind}: {request_id} at {record['chosen']}: {said} {record.get('untokenized')}, "
                f"and it reports {reported} of {usage['prompt_tokens']}"
            )

    def check(self, kind: str, path: str, fields: Fields) -> dict[str, Any]:
        """Send it, compare, and wait until the engine has told of it."""
        request_id, answer = self.send(path, fields)
        self.compare(kind, request_id, answer)
        self.settle()
        return answer


def post(url: str, body: object, request_id: str = "") -> Any:
    headers = {"content-type": "application/json"} | ({"x-request-id": request_id} if request_id else {})
    asked = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(asked, timeout=120) as response:
        return json.loads(response.read() or b"null")


@contextmanager
def routing(pool: Pool, *settings: str) -> Iterator[Router]:
    gateway = Gateway(
        *pool.engines,
        settings=[f"kv_events.bind={pool.bind}", "tokens.budget_s=5", "decisions.keep=1000", *settings],
    )
    try:
        yield Router(gateway)
    finally:
        assert gateway.stop() == 0


ASKED = "tokens.models={}"
HERE = f"tokens.models={{{MODEL}: {HOME / MODEL}}}"
ANY = "scheduling.preset=random"


def words(rng: random.Random, how_many: int) -> str:
    return " ".join(
        f"{rng.choice(('def', 'class', 'self', 'None'))} {rng.randrange(1000)}" for _ in range(how_many)
    )


def text(rng: random.Random, prefix: str) -> Fields:
    return {"prompt": prefix + words(rng, rng.randrange(1, 40)), "max_tokens": rng.randrange(1, 40)}


def chat(rng: random.Random, prefix: str) -> Fields:
    messages = [{"role": "system", "content": prefix}, {"role": "user", "content": words(rng, 20)}]
    return {"messages": messages, "max_tokens": rng.randrange(1, 40)}


def workload(seed: int, requests: int) -> Iterator[tuple[str, str, Fields]]:
    """Requests whose prefixes others have, with an adapter or a salt or neither."""
    rng = random.Random(seed)
    prefixes = [words(rng, rng.randrange(40, 160)) for _ in range(3)]
    for number in range(requests):
        path, make = ((TEXT, text), (CHAT, chat))[number % 2]
        fields = make(rng, rng.choice(prefixes))
        kind = rng.choice(("plain", "plain", "lora", "salt", "lora and salt"))
        if "lora" in kind:
            fields["model"] = rng.choice(ADAPTERS)
        if "salt" in kind:
            fields["cache_salt"] = rng.choice(SALTS)
        yield kind, path, fields


def told(figures: list[str], title: str, router: Router, start_s: float) -> None:
    """Say how many were right, and that all were."""
    exact = sum(router.exact.values())
    all_ = exact + len(router.wrong)
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(router.exact.items()))
    figures.append(
        f"{title}: {exact} of {all_} exact ({kinds}), {router.cached_tokens} tokens cached, "
        f"{time.monotonic() - start_s:.0f} s"
    )
    assert not router.wrong, "\n".join(router.wrong)
    assert exact == all_ > 0


FRESH = count(1000)
"""Seeds of prompts that nobody has seen."""


def warm(router: Router, pool: Pool) -> None:
    """Blocks are known from the first event on: each engine tells of some."""
    for engine in pool.engines:
        router.only(engine, pool.engines)
        router.send(TEXT, {"prompt": words(random.Random(next(FRESH)), 40), "max_tokens": 1})
    router.only(None, pool.engines)
    router.knows()


@pytest.mark.parametrize("tokens", [HERE, ASKED], ids=["tokenised here", "tokenised by the engine"])
def test_one_after_the_other(pool: Pool, figures: list[str], tokens: str) -> None:
    start_s = time.monotonic()
    with routing(pool, ANY, tokens) as router:
        warm(router, pool)
        for kind, path, fields in workload(seed=len(tokens), requests=100):
            router.check(kind, path, fields)
        told(figures, f"one after the other, {tokens.partition(':')[0]}", router, start_s)
        assert router.cached_tokens > 5000


def precise_policy(pool: Pool) -> Fields:
    """llm-d's plugins: events of the engine that is connected to, and of the one that connects."""
    producer = "precise-prefix-cache-producer"
    return {
        "apiVersion": "llm-d.ai/v1alpha1",
        "kind": "EndpointPickerConfig",
        "plugins": [
            {"type": "endpoint-notification-source"},
            {"type": producer, "parameters": {"kvEventsConfig": {"zmqEndpoint": pool.bind}}},
            {"type": "prefix-cache-scorer", "parameters": {"prefixMatchInfoProducerName": producer}},
            {"type": "no-hit-lru-scorer", "parameters": {"prefixMatchInfoProducerName": producer}},
        ],
        "dataLayer": {
            "sources": [
                {"pluginRef": "endpoint-notification-source", "extractors": [{"pluginRef": producer}]},
            ]
        },
    }


def test_an_llm_d_configuration_keeps_conversations_where_they_are_cached(
    pool: Pool, figures: list[str], tmp_path: Path
) -> None:
    rng, start_s = random.Random(5), time.monotonic()
    policy = tmp_path / "epp.json"
    policy.write_text(json.dumps(precise_policy(pool)))
    with routing(pool, HERE, f"scheduling.picker_config={policy}") as router:
        warm(router, pool)
        begun = [[{"role": "system", "content": words(rng, 40)}] for _ in range(3)]
        homes: list[set[str]] = [set() for _ in begun]
        for turn in range(5):
            for messages, home in zip(begun, homes, strict=True):
                messages.append({"role": "user", "content": words(rng, 20)})
                answer = router.check(f"turn {turn + 1}", CHAT, {"messages": messages, "max_tokens": 20})
                messages.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})
                home.add(router.last["chosen"])
                assert turn == 0 or router.last["matched_tokens"] > 0
        told(figures, "conversations under an llm-d configuration", router, start_s)
        assert [len(home) for home in homes] == [1, 1, 1]
        assert len(set.union(*homes)) == 2, "each engine has some"


@pytest.mark.parametrize(("clients", "shared"), [(1, True), (3, False), (6, True)])
def test_back_to_back(pool: Pool, figures: list[str], clients: int, shared: bool) -> None:
    """Nobody waits for the events of the request before, which come when the next has been decided on.
    Clients have one prefix, or one each, and send each prompt twice.
    """
    rng, start_s = random.Random(clients), time.monotonic()
    with routing(pool, ANY, HERE) as router:
        warm(router, pool)
        prefix = words(rng, 60)
        prefixes = [prefix if shared else words(rng, 60) for _ in range(clients)]

        def client(number: int) -> list[tuple[str, dict[str, Any]]]:
            made = random.Random(1000 * clients + number)
            prompts = [prefixes[number] + words(made, 20) for _ in range(60 // clients)]
            twice = [prompt for prompt in prompts for _ in range(2)]
            return [router.send(TEXT, {"prompt": prompt, "max_tokens": 1}) for prompt in twice]

        with ThreadPoolExecutor(clients) as threads:
            answers = [answer for found in threads.map(client, range(clients)) for answer in found]
        for request_id, answer in answers:
            router.compare("request", request_id, answer)
        title = f"back to back, {clients} at once, {'one prefix' if shared else 'a prefix each'}"
        told(figures, title, router, start_s)
        assert router.cached_tokens > 5000


def test_what_was_evicted_is_not_expected(pool: Pool, figures: list[str]) -> None:
    rng, start_s = random.Random(6), time.monotonic()
    with routing(pool, HERE) as router:
        warm(router, pool)
        for engine in pool.engines:
            router.only(engine, pool.engines)
            kept = {"prompt": words(rng, 100), "max_tokens": 1}
            router.check("first", TEXT, kept)
            router.check("again", TEXT, kept)
            assert router.last["matched_tokens"] > 300
            for _ in range(CACHE_TOKENS // 500 + 1):
                router.check("others", TEXT, {"prompt": words(rng, 150), "max_tokens": 1})
            router.check("evicted", TEXT, kept)
            assert router.last["matched_tokens"] == 0
            router.check("again", TEXT, kept)
            assert router.last["matched_tokens"] > 300
        router.only(None, pool.engines)
        told(figures, "evictions", router, start_s)


def test_a_router_that_is_started_anew_knows_what_was_before_it(pool: Pool, figures: list[str]) -> None:
    rng, start_s = random.Random(7), time.monotonic()
    prompts = [{"prompt": words(rng, 80), "max_tokens": 1} for _ in range(4)]
    with routing(pool, HERE) as before:
        warm(before, pool)
        for prompt in prompts:
            before.check("before", TEXT, prompt)
        told(figures, "before a new router", before, start_s)
    with routing(pool, HERE) as router:
        router.knows()
        for prompt in prompts:
            router.check("after", TEXT, prompt)
            assert router.last["matched_tokens"] > 200
        told(figures, "a new router, from the replay", router, start_s)


def test_a_cache_that_is_reset_holds_nothing(pool: Pool, figures: list[str]) -> None:
    """The engine tells of it with its next step only: the request after it is told wrongly."""
    rng, start_s = random.Random(8), time.monotonic()
    with routing(pool, HERE) as router:
        warm(router, pool)
        for engine in pool.engines:
            router.only(engine, pool.engines)
            prompt = {"prompt": words(rng, 80), "max_tokens": 1}
            router.check("before", TEXT, prompt)
            router.check("before", TEXT, prompt)
            assert router.last["matched_tokens"] > 200
            post(f"{engine.url}/reset_prefix_cache", {})
            router.send(TEXT, {"prompt": words(rng, 4), "max_tokens": 1})
            router.settle()
            router.check("after", TEXT, prompt)
            assert router.last["matched_tokens"] == 0
            router.check("after", TEXT, prompt)
            assert router.last["matched_tokens"] > 200
        router.only(None, pool.engines)
        told(figures, "a reset of the cache", router, start_s)


@pytest.mark.parametrize("number", [0, 1])
def test_an_engine_that_is_killed_comes_back_empty(pool: Pool, figures: list[str], number: int) -> None:
    rng, start_s = random.Random(9), time.monotonic()
    killed, other = pool.engines[number], pool.engines[1 - number]
    with routing(pool, HERE) as router:
        warm(router, pool)
        router.only(killed, pool.engines)
        prompt = {"prompt": words(rng, 80), "max_tokens": 1}
        router.check("before", TEXT, prompt)
        router.check("before", TEXT, prompt)
        assert router.last["matched_tokens"] > 200
        router.only(None, pool.engines)
        killed.stop(signal.SIGKILL)
        request_id, _ = router.send(TEXT, prompt)
        assert router.record(request_id)["chosen"] == other.name
        killed.start()
        killed.wait()
        up_s = time.monotonic()
        eventually(lambda: router.serves(killed), 60, "the engine is found again")
        router.only(killed, pool.engines)
        router.send(TEXT, {"prompt": words(rng, 40), "max_tokens": 1})
        healed = eventually(
            lambda: router.blocks(killed) > 0, 30, f"events come again: {json.dumps(router.sources())}"
        )
        figures.append(
            f"engine {number} killed: requests {time.monotonic() - up_s - healed:.1f} s after it answered, "
            f"events {healed:.1f} s later"
        )
        router.settle()
        router.check("after", TEXT, prompt)
        assert router.last["matched_tokens"] == 0
        router.check("after", TEXT, prompt)
        assert router.last["matched_tokens"] > 200
        router.only(None, pool.engines)
        for kind, path, fields in workload(seed=number, requests=20):
            router.check(kind, path, fields)
        told(figures, f"engine {number} killed and started again", router, start_s)
