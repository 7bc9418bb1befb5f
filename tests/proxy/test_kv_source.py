"""The holder of a prefix is named to the endpoint, and a client names nobody."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pointsman.scheduling.producers.p2p_source import HEADER
from pointsman.testing.client import RawClient, message
from pointsman.testing.serving import admin, serving
from pointsman.testing.upstream import FakeUpstream

TURNS = {
    "apiVersion": "llm-d.ai/v1alpha1",
    "kind": "EndpointPickerConfig",
    "plugins": [{"type": "p2p-source-producer"}, {"type": "round-robin-picker"}],
}
"""Whoever's turn it is gets the request."""


@pytest.fixture
def turns(tmp_path: Path) -> str:
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(TURNS))
    return str(path)


@pytest.mark.parametrize("workers", [0, 1])
async def test_the_endpoint_is_told_who_holds_the_prefix(turns: str, workers: int) -> None:
    asked = message(
        "POST", "/v1/completions", {"model": "m", "prompt": "word " * 2000}, f"{HEADER}: 10.9.9.9:1"
    )
    policy = {"picker_config": turns}
    async with (
        FakeUpstream() as a,
        FakeUpstream() as b,
        serving(a, b, server={"workers": workers}, scheduling=policy) as app,
        RawClient(app.port) as client,
    ):
        for _ in range(3):
            assert (await client.ask(asked)).status == 200
        first, last = a.requests if len(a.requests) == 2 else b.requests
        (second,) = b.requests if len(a.requests) == 2 else a.requests
        name = a.name if len(a.requests) == 2 else b.name
        assert HEADER not in first.headers
        assert second.headers[HEADER] == name
        assert second.names.count(HEADER) == 1
        assert json.loads(second.body)["model"] == "m"
        assert HEADER not in last.headers  # by then it holds the prompt itself
        records = json.loads((await admin(app, "/decisions")).body)["decisions"]
        assert [r.get("request_headers") for r in records] == [None, {HEADER: name}, None]
