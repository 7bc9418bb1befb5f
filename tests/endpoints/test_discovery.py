# ruff: noqa: ASYNC240 - small files in a folder of the test's own
"""The pool is what the settings, the watched file and the DNS say."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from pointsman.config import Discovery as Settings
from pointsman.config import Endpoint
from pointsman.endpoints.discovery import file
from pointsman.endpoints.discovery.watch import Discovery
from pointsman.endpoints.pool import Pool
from pointsman.endpoints.target import targets_of
from pointsman.errors import SettingsError

OURS = """
endpoints:
- url: http://10.0.0.1:8000
  name: one
  weight: 2
  labels: {gpu: h100}
  role: decode
- url: https://[fd00::1]:8443/base
"""
LLMD = """
endpoints:
- name: pod-a
  namespace: serving
  address: 10.0.0.1
  port: "8000"
  labels: {llm-d.ai/role: prefill}
- address: fd00::1
  port: 8000
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "endpoints.yaml"


class TestReading:
    def test_our_own_form(self, path: Path) -> None:
        path.write_text(OURS)
        one, two = [targets_of(endpoint)[0] for endpoint in file.read(str(path))]
        assert (one.name, one.url.authority, one.settings.weight) == ("one", "10.0.0.1:8000", 2.0)
        assert one.labels == {"gpu": "h100", "llm-d.ai/role": "decode"}
        assert (two.name, two.url.tls) == ("[fd00::1]:8443/base", True)

    def test_llm_ds_form(self, path: Path) -> None:
        path.write_text(LLMD)
        one, two = [targets_of(endpoint)[0] for endpoint in file.read(str(path))]
        assert (one.name, one.url.authority) == ("pod-a", "10.0.0.1:8000")
        assert one.labels == {"namespace": "serving", "llm-d.ai/role": "prefill"}
        assert (two.name, two.labels) == ("[fd00::1]:8000", {"namespace": "default"})

    def test_json_and_both_forms_in_one_file(self, path: Path) -> None:
        path.write_text(json.dumps({"endpoints": [{"url": "http://a:1"}, {"address": "b", "port": 2}]}))
        assert [endpoint.url for endpoint in file.read(str(path))] == ["http://a:1", "http://b:2"]

    @pytest.mark.parametrize(
        ("text", "names"),
        [
            ("endpoints: [", "not YAML"),
            ("- url: http://a", "mapping"),
            ("endpoints: {}", "a list, is expected"),
            ("endpoints: []\nmore: 1", "the one key `endpoints`"),
            ("endpoints: [{url: http://a, wieght: 2}]", "endpoints\\[0\\].*wieght"),
            ("endpoints: [{url: http://a}, {url: ftp://b}]", "endpoints\\[1\\].url.*http"),
            ("endpoints: [{address: a, port: 1, prot: 2}]", "endpoints\\[0\\].*prot"),
            ("endpoints: [{address: a}]", "endpoints\\[0\\].*port"),
            ("endpoints: [{url: http://a, api_key_env: NOT_SET_ANYWHERE}]", "NOT_SET_ANYWHERE"),
        ],
    )
    def test_what_cannot_be_used_is_named(self, text: str, names: str, path: Path) -> None:
        path.write_text(text)
        with pytest.raises(SettingsError, match=names):
            file.read(str(path))

    def test_a_missing_or_huge_file(self, path: Path) -> None:
        with pytest.raises(SettingsError, match="cannot be read"):
            file.read(str(path))
        path.write_text("#" * (file.MAX_FILE_BYTES + 1))
        with pytest.raises(SettingsError, match="larger than"):
            file.read(str(path))


class Rig:
    """A pool kept up to date under looptime: seconds cost nothing."""

    def __init__(self, pool: Pool, discovery: Discovery) -> None:
        self.pool = pool
        self.discovery = discovery

    @property
    def names(self) -> list[str]:
        return list(self.pool.members)


@asynccontextmanager
async def discovering(*urls: str, **settings: Any) -> AsyncIterator[Rig]:
    loop = asyncio.get_running_loop()
    pool = Pool(loop.time)
    discovery = Discovery(pool, Settings(**settings), [Endpoint(url=url) for url in urls])
    await discovery.start()
    task = asyncio.create_task(discovery.run())
    try:
        yield Rig(pool, discovery)
        assert not task.done(), "it still watches"
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def entry(*names: str) -> str:
    return json.dumps(
        {"endpoints": [{"url": f"http://10.0.0.1:{8000 + i}", "name": n} for i, n in enumerate(names)]}
    )


@pytest.mark.looptime
class TestWatching:
    async def test_changes_are_followed(self, path: Path) -> None:
        path.write_text(entry("a", "b"))
        async with discovering(file=str(path)) as rig:
            assert rig.names == ["a", "b"]
            path.write_text(entry("a", "bb", "c"))
            await asyncio.sleep(1.5)
            assert rig.names == ["a", "bb", "c"]
            path.write_text("endpoints: []")
            await asyncio.sleep(1.5)
            assert rig.names == []

    @pytest.mark.parametrize(
        "broken",
        [
            "endpoints: [",
            "",
            entry("twice", "twice"),
            "endpoints: [{url: https://x, tls_ca: /no/such/file}]",
            None,
        ],
    )
    async def test_a_file_that_cannot_be_used_leaves_everything_as_it_was_and_is_an_error_in_the_log(
        self, broken: str | None, path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        path.write_text(entry("a"))
        async with discovering(file=str(path)) as rig:
            if broken is None:
                path.unlink()
            else:
                path.write_text(broken)
            await asyncio.sleep(3.5)
            assert rig.names == ["a"]
            errors = [r for r in caplog.records if r.levelno == logging.ERROR]
            assert len(errors) == 1, "said once, not every second"
            assert "keeping the endpoints we have" in errors[0].getMessage()
            path.write_text(entry("a", "again"))
            await asyncio.sleep(1.5)
            assert rig.names == ["a", "again"]

    async def test_a_file_that_is_read_once_is_not_watched(self, path: Path) -> None:
        path.write_text(entry("a"))
        async with discovering(file=str(path), watch_file=False) as rig:
            path.write_text(entry("a", "b"))
            await asyncio.sleep(5)
            assert rig.names == ["a"]

    async def test_a_file_that_cannot_be_used_at_first_stops_start_up(self, path: Path) -> None:
        with pytest.raises(SettingsError, match="cannot be read"):
            async with discovering(file=str(path)):
                pass

    async def test_the_settings_and_the_file_are_two_sources_and_the_first_has_a_name(
        self, path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        path.write_text(entry("10.9.9.9:80", "b"))
        async with discovering("http://10.9.9.9:80", file=str(path)) as rig:
            assert {n: m.source for n, m in rig.pool.members.items()} == {
                "10.9.9.9:80": "settings",
                "b": "file",
            }
            assert "ignored: settings has it" in caplog.text


async def test_two_endpoints_of_one_name_stop_start_up() -> None:
    with pytest.raises(SettingsError, match=r"two are called 10\.0\.0\.1:80"):
        async with discovering("http://10.0.0.1", "http://10.0.0.1"):
            pass


@pytest.fixture
async def dns(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str] | None]:
    """Names and their addresses; None is a name that cannot be resolved now."""
    table: dict[str, list[str] | None] = {}

    async def getaddrinfo(host: str, port: None, *, type: int) -> list[tuple[Any, ...]]:
        await asyncio.sleep(0)
        addresses = table.get(host)
        if addresses is None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        families = [(socket.AF_INET6 if ":" in address else socket.AF_INET, address) for address in addresses]
        return [(family, type, 6, "", (address, 0)) for family, address in families]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    return table


@pytest.mark.looptime
class TestNames:
    async def test_a_name_with_many_addresses_is_as_many_endpoints(self, dns: dict[str, Any]) -> None:
        dns["svc"] = ["10.0.0.2", "10.0.0.1", "10.0.0.2"]
        async with discovering("http://svc:8000") as rig:
            assert rig.names == ["svc:8000@10.0.0.1", "svc:8000@10.0.0.2"]
            assert [m.target.connect_host for m in rig.pool.members.values()] == ["10.0.0.1", "10.0.0.2"]
            assert {m.endpoint.address for m in rig.pool.members.values()} == {"svc:8000"}

    async def test_a_name_with_one_address_keeps_its_own_name(self, dns: dict[str, Any]) -> None:
        dns["one"] = ["10.0.0.1"]
        async with discovering("http://one:8000") as rig:
            assert rig.names == ["one:8000"]

    async def test_the_second_family_is_the_same_server(self, dns: dict[str, Any]) -> None:
        dns["both"] = ["10.0.0.1", "fd00::1"]
        dns["six"] = ["fd00::1", "fd00::2"]
        async with discovering("http://both:8000", "http://six:8000") as rig:
            assert rig.names == ["both:8000", "six:8000@fd00::1", "six:8000@fd00::2"]

    async def test_addresses_that_come_and_go_are_followed(self, dns: dict[str, Any]) -> None:
        dns["svc"] = ["10.0.0.1", "10.0.0.2"]
        async with discovering("http://svc:8000") as rig:
            stayed = rig.pool.members["svc:8000@10.0.0.2"]
            dns["svc"] = ["10.0.0.2", "10.0.0.3"]
            await asyncio.sleep(11)
            assert rig.names == ["svc:8000@10.0.0.2", "svc:8000@10.0.0.3"]
            assert rig.pool.members["svc:8000@10.0.0.2"] is stayed

    async def test_what_was_known_stays_while_the_dns_is_silent(self, dns: dict[str, Any]) -> None:
        dns["svc"] = ["10.0.0.1", "10.0.0.2"]
        async with discovering("http://svc:8000") as rig:
            dns["svc"] = None
            await asyncio.sleep(31)
            assert len(rig.names) == 2

    async def test_a_name_that_cannot_be_resolved_yet_is_an_endpoint_all_the_same(
        self, dns: dict[str, Any], caplog: pytest.LogCaptureFixture
    ) -> None:
        async with discovering("http://later:8000") as rig:
            assert rig.names == ["later:8000"]
            assert "cannot resolve later" in caplog.text
            dns["later"] = ["10.0.0.1", "10.0.0.2"]
            await asyncio.sleep(11)
            assert len(rig.names) == 2

    async def test_an_endpoint_taken_out_by_hand_stays_out_until_it_is_added_again(
        self, dns: dict[str, Any]
    ) -> None:
        dns["svc"] = ["10.0.0.1", "10.0.0.2"]
        async with discovering("http://svc:8000") as rig:
            gone = rig.pool.members["svc:8000@10.0.0.1"].target
            rig.pool.remove(gone.name)
            await asyncio.sleep(31)
            assert rig.names == ["svc:8000@10.0.0.2"]
            rig.pool.add(gone, "admin")
            await asyncio.sleep(31)
            assert len(rig.names) == 2

    async def test_names_of_a_file_are_resolved_too_and_a_slow_dns_does_not_bring_an_old_file_back(
        self, dns: dict[str, Any], path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        dns["svc"] = ["10.0.0.1", "10.0.0.2"]
        path.write_text('{"endpoints": [{"url": "http://svc:8000"}]}')
        async with discovering(file=str(path)) as rig:
            assert len(rig.names) == 2
            loop = asyncio.get_running_loop()
            quick = loop.getaddrinfo

            async def slow(*args: Any, **options: Any) -> Any:
                await asyncio.sleep(5)
                return await quick(*args, **options)

            monkeypatch.setattr(loop, "getaddrinfo", slow)
            await asyncio.sleep(9.5)
            path.write_text('{"endpoints": [{"url": "http://10.0.0.9:8000"}]}')
            await asyncio.sleep(10)
            assert rig.names == ["10.0.0.9:8000"]
