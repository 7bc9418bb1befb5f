"""Where endpoints publish their KV events, by what they say and what the settings say."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from pointsman.config import KvEvents as Settings
from pointsman.prefix.kv_addresses import SourceAddress, configured, told

HOST = "10.0.0.7"


def config(
    endpoint: str = "tcp://*:5557", replay: str | None = "tcp://*:5558", **fields: Any
) -> dict[str, Any]:
    return {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": endpoint,
        "replay_endpoint": replay,
        "buffer_steps": 10000,
        "topic": "kv@e@m",
    } | fields


def said(tree: object, host: str = HOST) -> list[SourceAddress] | None:
    return told(msgspec.json.encode(tree), host)


def at(address: str, replay: str = "", rank: int = 0, topic: str = "kv@e@m") -> SourceAddress:
    return SourceAddress(rank, address, replay, topic)


@pytest.mark.parametrize("anywhere", ["*", "[::]", "::", "0.0.0.0"])
def test_an_engine_that_listens_everywhere_is_found_at_the_endpoints_host(anywhere: str) -> None:
    tree = {"0": config(f"tcp://{anywhere}:5557", f"tcp://{anywhere}:5558")}
    assert said(tree) == [at("tcp://10.0.0.7:5557", "tcp://10.0.0.7:5558")]
    assert said(tree, "fd00::7") == [at("tcp://[fd00::7]:5557", "tcp://[fd00::7]:5558")]


def test_an_engine_with_any_other_address_connects_to_its_subscriber_and_listens_for_replays() -> None:
    tree = {"0": config("tcp://127.0.0.1:5557", "tcp://127.0.0.1:5558")}
    assert said(tree) == [at("", "tcp://10.0.0.7:5558")]


def test_ranks_that_are_told_one_address_add_theirs_to_its_port() -> None:
    tree = {"1": config(), "0": config()}
    assert said(tree) == [
        at("tcp://10.0.0.7:5557", "tcp://10.0.0.7:5558"),
        at("tcp://10.0.0.7:5558", "tcp://10.0.0.7:5559", 1),
    ]


def test_ranks_that_are_told_addresses_of_their_own_have_these() -> None:
    tree = {"0": config("tcp://*:7000", None), "1": config("tcp://*:8000", None)}
    assert said(tree) == [at("tcp://10.0.0.7:7000"), at("tcp://10.0.0.7:8000", rank=1)]
    assert said({"3": config("tcp://*:7003", None)}) == [at("tcp://10.0.0.7:7003", rank=3)]


@pytest.mark.parametrize("around", [lambda entries: entries, lambda entries: {"sources": entries}])
def test_a_list_says_what_publishers_are_bound_to(around: Any) -> None:
    entries = [
        {"data_parallel_rank": 1, "endpoint": "tcp://0.0.0.0:41002", "replay_endpoint": None, "topic": "t"},
        {
            "data_parallel_rank": 0,
            "endpoint": "tcp://10.0.0.9:41001",
            "replay_endpoint": "tcp://0.0.0.0:41003",
        },
    ]
    assert said(around(entries)) == [
        at("tcp://10.0.0.7:41002", rank=1, topic="t"),
        at("tcp://10.0.0.9:41001", "tcp://10.0.0.7:41003", topic=""),
    ]


def test_sockets_of_the_machine_are_for_engines_on_this_machine() -> None:
    tree = {"0": config("ipc:///run/kv", "ipc:///run/kv-replay")}
    assert said(tree, "127.0.0.1") == [at("ipc:///run/kv", "ipc:///run/kv-replay")]
    assert said(tree, "localhost") == [at("ipc:///run/kv", "ipc:///run/kv-replay")]
    assert said(tree) == [at("")]


@pytest.mark.parametrize(
    "tree",
    [{}, [], {"sources": []}, {"0": config(publisher="null")}, {"0": config(enable_kv_cache_events=False)}],
)
def test_an_engine_whose_events_are_off_has_none(tree: object) -> None:
    assert said(tree) == []


@pytest.mark.parametrize(
    "page",
    [
        b"",
        b"not json",
        b"\xff",
        b"5",
        b'"text"',
        b"[" * 100_000,
        b'{"zero": {}}',
        b'{"0": 5}',
        b'{"999": {"endpoint": "tcp://*:1"}}',
        b'{"-1": {"endpoint": "tcp://*:1"}}',
        b'{"detail": "Not Found"}',
        b'[{"endpoint": 5}]',
    ],
)
def test_a_page_that_makes_no_sense_says_nothing(page: bytes) -> None:
    assert told(page, HOST) is None


@pytest.mark.parametrize(
    "endpoint", ["tcp://*", "tcp://*:x", "tcp://*:0", "tcp://*:70000", "udp://*:5557", "inproc://*"]
)
def test_an_address_that_nobody_can_connect_to_is_none(endpoint: str) -> None:
    assert said({"0": config(endpoint, None)}) == [at("")]


def test_the_settings_say_it_for_every_rank() -> None:
    assert configured(Settings(ranks=2, replay_port=6000), HOST) == [
        at("tcp://10.0.0.7:5557", "tcp://10.0.0.7:6000", 0, "kv@"),
        at("tcp://10.0.0.7:5558", "tcp://10.0.0.7:6001", 1, "kv@"),
    ]
    assert configured(Settings(bind="tcp://*:5557", port=7), HOST) == [at("", topic="kv@")]
