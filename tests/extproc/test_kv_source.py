"""The holder of a prefix is named to gateways that ask, and what a client says of it is removed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.extproc.test_authz import lane

from pointsman.extproc.messages import BUFFERED, FULL_DUPLEX
from pointsman.scheduling.producers.p2p_source import HEADER
from pointsman.testing.client import message
from pointsman.testing.envoy import behind_envoy
from pointsman.testing.picking import Stage, destination, headers_set
from pointsman.testing.upstream import FakeUpstream

TURNS = json.dumps(
    {
        "apiVersion": "llm-d.ai/v1alpha1",
        "kind": "EndpointPickerConfig",
        "plugins": [{"type": "p2p-source-producer"}, {"type": "round-robin-picker"}],
    }
)
BODY = json.dumps({"model": "m", "prompt": "word " * 2000}).encode()


@pytest.mark.parametrize("mode", [FULL_DUPLEX, BUFFERED])
def test_the_picker_names_it_beside_the_destination(mode: int) -> None:
    stage = Stage(picker_config=TURNS)
    named, removed, gone = [], [], []
    for _ in range(2):
        call = stage.call()
        call.head("/v1/completions", modes=(mode, FULL_DUPLEX), x_kv_cache_source_host_port="10.9.9.9:1")
        answer = call.body(BODY)[0]
        response = answer.request_body if mode == BUFFERED else answer.request_headers
        removed.append(HEADER in response.response.header_mutation.remove_headers)
        named.append(headers_set(answer).get(HEADER))
        gone.append(destination(answer))
    assert named == [None, gone[0]]
    assert removed == [True, False]


async def test_the_fast_lane_names_it(tmp_path: Path) -> None:
    policy = tmp_path / "policy.json"
    policy.write_text(TURNS)
    async with (
        FakeUpstream() as a,
        FakeUpstream() as b,
        lane(a.url, b.url, scheduling={"picker_config": str(policy)}) as found,
    ):
        answers = [await found.ask("/decide/v1/completions", BODY, "x-request-id: r") for _ in range(2)]
        (_, first, _), (_, second, _) = answers
        assert HEADER not in first
        assert second[HEADER] == first["x-gateway-destination-endpoint"]


@pytest.mark.parametrize("fast", [False, True], ids=["ext_proc", "fast-lane"])
async def test_behind_envoy_the_endpoint_is_told_and_a_client_names_nobody(
    tmp_path: Path, fast: bool
) -> None:
    policy = tmp_path / "policy.json"
    policy.write_text(TURNS)
    asked = message("POST", "/v1/completions", BODY, f"{HEADER}: 10.9.9.9:1")
    async with (
        FakeUpstream() as a,
        FakeUpstream() as b,
        behind_envoy(a, b, fast_lane=fast, scheduling={"picker_config": str(policy)}) as gateway,
    ):
        async with gateway.client() as client:
            for _ in range(2):
                assert (await client.ask(asked)).status == 200
        (first,), (second,) = a.requests, b.requests
        told = {a.name: first.headers.get(HEADER), b.name: second.headers.get(HEADER)}
        assert told in ({a.name: None, b.name: a.name}, {a.name: b.name, b.name: None})
        await gateway.until(lambda: len(gateway.ended) == 2)
        assert gateway.in_flight == 0
