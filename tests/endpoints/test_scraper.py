"""When pages and model lists are read, by a clock that the test turns; and what becomes of them."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from itertools import pairwise

import pytest
from msgspec.structs import replace

from pointsman.config import Endpoint as Settings
from pointsman.config import MetricsSettings
from pointsman.endpoints.metrics.scraper import Scraper
from pointsman.endpoints.metrics.source import PageSource, engines
from pointsman.endpoints.pool import Pool
from pointsman.endpoints.target import targets_of
from pointsman.testing.upstream import FakeUpstream

SETTINGS = MetricsSettings(interval_s=0.1, idle_interval_s=5.0, models_interval_s=30.0)
SOURCE = PageSource(engines=engines(), engine_labels=("engine",))
STEP_S = 0.01
VLLM = b"# vLLM\nvllm:num_requests_running 2\nvllm:num_requests_waiting 1\nprocess_start_time_seconds 1\n"
SGLANG = b"# SGLang\nsglang:num_running_reqs 4\n"


class Rig:
    """A pool, its scraper and the time."""

    def __init__(self, source: PageSource | None = SOURCE) -> None:
        self.now = 100.0
        self.pool = Pool(lambda: self.now)
        self.scraper = Scraper(self.pool, SETTINGS, lambda: self.now, source)

    def add(self, upstream: FakeUpstream, **fields: object) -> None:
        settings = Settings(url=upstream.url, **fields)  # type: ignore[arg-type]
        self.pool.add(targets_of(settings)[0], "settings")

    async def settle(self) -> None:
        """Until everything asked for has been answered."""
        scraper = self.scraper
        watched = scraper._watched.values()
        while scraper._lookups or any(w.fetcher and w.fetcher.busy for w in watched):  # noqa: ASYNC110
            await asyncio.sleep(0)

    async def run(self, seconds: float, each: Callable[[], None] = lambda: None) -> None:
        """Tick by tick; ``each`` is called before each."""
        end = self.now + seconds
        while self.now < end:
            self.now += STEP_S
            each()
            self.scraper.tick()
            await self.settle()

    async def close(self) -> None:
        for name in list(self.pool.members):
            self.pool.remove(name)


def count(upstream: FakeUpstream, path: str = "/metrics") -> int:
    return sum(probe.target == path for probe in upstream.probes)


async def page_times(
    rig: Rig, upstream: FakeUpstream, seconds: float, each: Callable[[], None]
) -> list[float]:
    """When the page was read."""
    times: list[float] = []
    seen = count(upstream)

    def look() -> None:
        nonlocal seen
        if count(upstream) > seen:
            times.append(rig.now - STEP_S)
            seen = count(upstream)
        each()

    await rig.run(seconds, look)
    return times


@pytest.fixture
async def upstream():  # type: ignore[no-untyped-def]
    async with FakeUpstream() as made:
        made.page = VLLM
        yield made


@pytest.fixture
async def rig(upstream: FakeUpstream):  # type: ignore[no-untyped-def]
    """One endpoint that has been read once."""
    made = Rig()
    made.add(upstream)
    await made.run(0.1)
    assert made.pool.ready
    yield made
    await made.close()


def load(rig: Rig, requests: int) -> None:
    for member in rig.pool.members.values():
        member.endpoint.load.requests = requests


async def test_an_idle_fleet_is_left_alone(rig: Rig, upstream: FakeUpstream) -> None:
    before = count(upstream)
    await rig.run(20)
    assert 3 <= count(upstream) - before <= 4


async def test_an_endpoint_with_requests_is_read_at_the_interval(rig: Rig, upstream: FakeUpstream) -> None:
    load(rig, 1)
    times = await page_times(rig, upstream, 2.0, lambda: None)
    assert 15 <= len(times) <= 21
    assert min(b - a for a, b in pairwise(times)) >= SETTINGS.interval_s - 1e-6


async def test_it_is_read_soon_after_it_became_busy(rig: Rig, upstream: FakeUpstream) -> None:
    await rig.run(2.0)
    before = count(upstream)
    load(rig, 1)
    await rig.run(SETTINGS.interval_s + STEP_S)
    assert count(upstream) > before


async def test_never_oftener_than_the_interval_however_the_load_comes_and_goes(
    rig: Rig, upstream: FakeUpstream
) -> None:
    rng = random.Random(5)
    times = await page_times(rig, upstream, 5.0, lambda: load(rig, rng.choice((0, 1))))
    assert len(times) > 20, "short requests do not keep it from being read"
    assert min(b - a for a, b in pairwise(times)) >= SETTINGS.interval_s - 1e-6


async def test_neighbours_that_become_busy_together_are_read_at_different_moments() -> None:
    rig = Rig()
    upstreams = [FakeUpstream() for _ in range(8)]
    for upstream in upstreams:
        upstream.page = VLLM
        await upstream.start()
        rig.add(upstream)
    await rig.run(2.0)
    load(rig, 1)
    most, before = 0, sum(map(count, upstreams))
    for _ in range(10):
        await rig.run(STEP_S)
        now = sum(map(count, upstreams))
        most, before = max(most, now - before), now
    assert 0 < most <= 3
    await rig.close()
    for upstream in upstreams:
        await upstream.stop()


async def test_what_the_page_says_reaches_the_pool(rig: Rig) -> None:
    (endpoint,) = rig.pool.candidates("")
    assert endpoint.engine == "vllm"
    assert (endpoint.metrics.running, endpoint.metrics.waiting) == (2.0, 1.0)
    assert endpoint.models == {"m"}


async def test_an_endpoint_that_goes_down_is_tried_every_second_and_its_models_are_read_again(
    rig: Rig, upstream: FakeUpstream
) -> None:
    member = rig.pool.members[upstream.name]
    await upstream.stop()
    await rig.run(5.1)
    assert not member.reached
    assert not member.breaker.passes
    await upstream.start()
    upstream.models, upstream.page = ["other"], SGLANG
    await rig.run(1.1)
    assert member.reached
    assert member.breaker.passes
    assert member.endpoint.models == {"other"}
    assert (member.endpoint.engine, member.endpoint.metrics.running) == ("sglang", 4.0)


async def test_models_are_read_again_after_a_restart_and_now_and_then(
    rig: Rig, upstream: FakeUpstream
) -> None:
    upstream.models = ["lora"]
    await rig.run(29.0)
    assert rig.pool.models() == ["m"]
    await rig.run(2.0)
    assert rig.pool.models() == ["lora"]
    upstream.models, upstream.page = ["new"], VLLM.replace(b"_seconds 1", b"_seconds 2")
    await rig.run(5.1)
    assert rig.pool.models() == ["new"]


@pytest.mark.parametrize(("page", "why"), [(b"", "answers 404"), (b"up 1\n", "has none of the metrics")])
async def test_an_endpoint_without_a_page_we_know_is_used_and_said_once(
    page: bytes, why: str, upstream: FakeUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    upstream.page = page
    rig = Rig()
    rig.add(upstream)
    load(rig, 1)
    with caplog.at_level(logging.WARNING):
        await rig.run(11.0)
    assert rig.pool.ready
    assert [why in record.getMessage() for record in caplog.records] == [True]
    assert count(upstream) <= 4, "asked seldom"
    await rig.close()


async def test_a_page_that_does_not_come_takes_nothing_away(rig: Rig, upstream: FakeUpstream) -> None:
    upstream.page = b"garbage \xff\n" * 10
    await rig.run(5.1)
    upstream.probe_gate.clear()
    rig.now += 5.1
    rig.scraper.tick()
    for _ in range(50):
        rig.scraper.tick()
        await asyncio.sleep(0)
    assert rig.pool.ready
    upstream.probe_gate.set()


async def test_the_label_of_an_endpoint_names_its_engine(upstream: FakeUpstream) -> None:
    upstream.page = VLLM + SGLANG
    rig = Rig()
    rig.add(upstream, labels={"engine": "sglang"})
    rig.add(upstream, labels={"engine": "vllm"}, name="second")
    await rig.run(0.1)
    assert [m.endpoint.engine for m in rig.pool.members.values()] == ["sglang", "vllm"]
    rig.pool.apply("settings", [])
    upstream.page = VLLM
    rig.add(upstream, labels={"engine": "unheard-of"})
    await rig.run(0.1)
    assert [m.endpoint.engine for m in rig.pool.members.values()] == ["vllm"]
    await rig.close()


async def test_a_page_elsewhere_is_read_with_the_same_credentials(upstream: FakeUpstream) -> None:
    async with FakeUpstream() as engine:
        rig = Rig()
        rig.add(engine, metrics_url=f"{upstream.url}/deep/metrics", api_key="secret")
        await rig.run(0.1)
        assert count(upstream, "/deep/metrics") == 1
        assert count(engine) == 0
        for probe in (*upstream.probes, *engine.probes):
            assert probe.headers["authorization"] == "Bearer secret"
        await rig.close()


async def test_an_unknown_model_makes_everybody_be_asked_at_most_once_a_second(
    rig: Rig, upstream: FakeUpstream
) -> None:
    upstream.models = ["loaded-just-now"]
    before = count(upstream, "/v1/models")
    for _ in range(5):
        await rig.scraper.refresh_models()
    assert rig.pool.models() == ["loaded-just-now"]
    assert count(upstream, "/v1/models") == before + 1
    rig.now += 1.1
    await rig.scraper.refresh_models()
    assert count(upstream, "/v1/models") == before + 2


async def test_an_endpoint_may_leave_while_it_is_asked(rig: Rig, upstream: FakeUpstream) -> None:
    upstream.probe_gate.clear()
    rig.now += 31
    rig.scraper.tick()
    await asyncio.sleep(0)
    assert rig.scraper._lookups
    rig.pool.remove(upstream.name)
    upstream.probe_gate.set()
    await rig.settle()
    assert not rig.pool.members


async def test_run_reads_until_it_is_cancelled(upstream: FakeUpstream) -> None:
    loop = asyncio.get_running_loop()
    pool = Pool(loop.time)
    scraper = Scraper(pool, SETTINGS, loop.time, SOURCE)
    pool.add(targets_of(Settings(url=upstream.url))[0], "settings")
    task = asyncio.create_task(scraper.run())
    while not pool.models():  # noqa: ASYNC110 - the scraper tells nobody
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert pool.ready


class TestWithoutPages:
    """``reads_metrics: false``: the model lists tell who is there."""

    async def test_no_page_is_read(self, upstream: FakeUpstream) -> None:
        rig = Rig(source=None)
        rig.add(upstream)
        await rig.run(10.0)
        assert rig.pool.ready
        assert rig.pool.models() == ["m"]
        assert count(upstream) == 0
        assert count(upstream, "/v1/models") <= 2
        await rig.scraper.refresh_models()
        assert count(upstream) == 0
        await rig.close()

    async def test_an_endpoint_that_was_down_is_found(self, upstream: FakeUpstream) -> None:
        rig = Rig(source=None)
        rig.add(upstream)
        await upstream.stop()
        await rig.run(2.0)
        assert not rig.pool.ready
        await upstream.start()
        await rig.run(1.1)
        assert rig.pool.ready
        rig.pool.unreachable(upstream.name)
        await rig.run(1.1)
        assert rig.pool.ready
        await rig.close()


async def test_an_exporters_page_tells_the_draw_and_gets_no_credentials(upstream: FakeUpstream) -> None:
    async with FakeUpstream() as exporter:
        exporter.page = b'# DCGM\nDCGM_FI_DEV_POWER_USAGE{gpu="0"} 310\n'
        rig = Rig()
        rig.add(upstream, watts_url=f"{exporter.url}/metrics", api_key="secret")
        await rig.run(11)
        (member,) = rig.pool.members.values()
        assert member.endpoint.watts == 310
        assert 2 <= count(exporter) <= 3, "draw changes slowly"
        assert all("authorization" not in probe.headers for probe in exporter.probes)
        assert any("authorization" in probe.headers for probe in upstream.probes)
        await rig.close()


@pytest.mark.parametrize("lost", [b"", b"# another page\nup 1\n"])
async def test_a_draw_that_is_told_no_more_stays_what_it_was(upstream: FakeUpstream, lost: bytes) -> None:
    async with FakeUpstream() as exporter:
        exporter.page = b"# AMD\ngpu_package_power 700\n"
        rig = Rig()
        rig.add(upstream, watts_url=f"{exporter.url}/metrics")
        await rig.run(1)
        exporter.page = lost
        before = count(exporter)
        await rig.run(6)
        assert count(exporter) > before
        (member,) = rig.pool.members.values()
        assert (member.endpoint.watts, member.reached) == (700, True)
        await rig.close()


async def test_the_draw_may_be_on_the_engines_own_page(upstream: FakeUpstream) -> None:
    upstream.page = VLLM + b"node_power_mW 650000\n"
    rig = Rig()
    rig.add(upstream, watts_metrics=("node_power_mW",))
    await rig.run(1)
    (member,) = rig.pool.members.values()
    assert member.endpoint.watts == pytest.approx(650)
    await rig.close()


async def test_a_custom_metric_called_watts_is_the_draw(upstream: FakeUpstream) -> None:
    upstream.page = VLLM + b"power 432\n"
    (vllm,) = [engine for engine in engines() if engine.engine == "vllm"]
    rig = Rig(PageSource(engines=[replace(vllm, attributes={"watts": "power"})]))
    rig.add(upstream)
    await rig.run(1)
    (member,) = rig.pool.members.values()
    assert member.endpoint.watts == 432
    await rig.close()
