"""A plugin with a bug costs the request that met it, and nobody else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from pointsman import registry
from pointsman.registry import Plugin
from pointsman.scheduling.cycle import Cycle
from pointsman.testing.client import RawClient, message
from pointsman.testing.serving import endings, in_flight, serving
from pointsman.testing.upstream import FakeUpstream, reply
from pointsman.types import Decision, InferenceRequest, Outcome

CONFIG = """
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins: [{type: test-buggy-scorer}]
schedulingProfiles: [{name: default, plugins: [{pluginRef: test-buggy-scorer}]}]
"""


class Buggy(Plugin):
    """Fails where the prompt says so: when scoring, or when it is told of the end."""

    def score(self, cycle: Cycle) -> Sequence[float]:
        if b"fail to score" in cycle.request.body:
            raise ZeroDivisionError("a bug")
        return [1.0] * len(cycle.endpoints)

    def on_outcome(self, request: InferenceRequest, decision: Decision, outcome: Outcome) -> None:
        if b"fail at the end" in request.body:
            raise ZeroDivisionError("a bug")


async def test_others_are_answered(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "picker.yaml"
    config.write_text(CONFIG)
    monkeypatch.setitem(registry._plugins, "test-buggy-scorer", Buggy)  # for this test only
    monkeypatch.setitem(registry._own_names, Buggy, "test-buggy-scorer")
    async with (
        FakeUpstream(lambda _: [reply(b'{"good": true}')]) as upstream,
        serving(upstream, scheduling={"picker_config": str(config)}) as app,
        RawClient(app.port) as client,
    ):
        asks = ["well", "fail to score", "fail at the end", "well"]
        bodies = [{"model": "m", "prompt": prompt} for prompt in asks]
        client.send(b"".join(message("POST", "/v1/completions", body) for body in bodies))
        answers = [await client.response() for _ in asks]
        assert [answer.status for answer in answers] == [200, 500, 200, 200]
        assert json.loads(answers[1].body)["error"]["code"] == "internal"
        assert await in_flight(app) == 0
        assert (await endings(app))["ok"] == 2  # one was not told of; the others were
    assert "could not be decided" in caplog.text
    assert "could not be told" in caplog.text
