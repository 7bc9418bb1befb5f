"""The gateway under llm-d's configurations for prefix routing, before engines that tell what they hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.proxy.test_precise_routing import EVENTS, SPEED, SYSTEM, ask, settled

from pointsman.errors import SettingsError
from pointsman.proxy.application import Application
from pointsman.sim.fleet import running_fleet
from pointsman.sim.spec import EngineSpec
from pointsman.testing.serving import admin, serving, settings

PRECISE, SENT = "precise-prefix-cache-producer", "approx-prefix-cache-producer"


def written(folder: Path, producer: str) -> dict[str, Any]:
    """Settings with a configuration whose scorer goes by this producer."""
    scorer = {"type": "prefix-cache-scorer", "parameters": {"prefixMatchInfoProducerName": producer}}
    path = folder / "epp.json"
    path.write_text(
        json.dumps(
            {
                "apiVersion": "llm-d.ai/v1alpha1",
                "kind": "EndpointPickerConfig",
                "plugins": [{"type": producer}, scorer],
            }
        )
    )
    policy = {"picker_config": str(path)}
    return {"scheduling": policy, "kv_events": {"mode": "auto"}, "tokens": {"budget_s": 5}}


async def test_requests_go_to_whom_engines_tell_to_hold_their_prefix(tmp_path: Path) -> None:
    specs = [EngineSpec(kv_events=EVENTS), EngineSpec(kv_events=EVENTS)]
    async with (
        running_fleet(specs, speed=SPEED) as engines,
        serving(*(e.url for e in engines), **written(tmp_path, PRECISE)) as app,
    ):
        told = json.loads((await admin(app, "/settings")).body)
        assert told["kv_events"]["mode"] == "all"
        names = [engine.url.removeprefix("http://") for engine in engines]
        for name, other in zip(names, reversed(names), strict=True):
            app.pool.drain(other, True)
            await ask(app, "/v1/completions", prompt=f"{name} {SYSTEM}")
            app.pool.drain(other, False)
        await settled(app)
        for name in names * 2:
            record, usage = await ask(app, "/v1/completions", prompt=f"{name} {SYSTEM}")
            assert (record["chosen"], record["matched_by"]) == (name, "events")
            cached = usage["prompt_tokens_details"]["cached_tokens"]
            assert record["matched_tokens"] == cached > 0.9 * usage["prompt_tokens"]
            await settled(app)


async def test_with_only_the_approximate_producer_engines_are_not_listened_to(tmp_path: Path) -> None:
    async with (
        running_fleet([EngineSpec(kv_events=EVENTS)], speed=SPEED) as (engine,),
        serving(engine.url, **written(tmp_path, SENT)) as app,
    ):
        for _ in range(2):
            record, _ = await ask(app, "/v1/completions", prompt=SYSTEM)
        assert record["matched_by"] == "sent"
        assert record["matched_tokens"] > 0
        assert app.core.kv_events.sources() == []


def test_settings_that_contradict_the_configuration_stop_the_start(tmp_path: Path) -> None:
    sections = written(tmp_path, SENT) | {"kv_events": {"mode": "all"}}
    with pytest.raises(SettingsError, match=rf"kv_events\.mode: .*{SENT}"):
        Application(settings("http://127.0.0.1:1", **sections))
