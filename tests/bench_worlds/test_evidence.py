"""Less to go by, against everything."""

from __future__ import annotations

import msgspec
import pytest
from bench.worlds import evidence
from bench.worlds.catalogue import load_worlds

from pointsman.bench.run import Load
from pointsman.twin.routers import Routers


def test_a_router_that_sees_as_much_has_the_whole_throughput_and_one_that_sees_less_is_measured() -> None:
    (world,) = load_worlds(["base-85"])
    short = (Load(rate=20, duration_s=4), Load(rate=40, duration_s=3))
    world = msgspec.structs.replace(world, scenario=msgspec.structs.replace(world.scenario, stages=short))
    full = evidence.runs_of(world, Routers(), range(2))
    same = evidence.judged("same", 1.0, evidence.runs_of(world, Routers(), range(2)), full)
    assert (same.found.mean, same.found.ci95) == (1.0, 0.0)
    less = evidence.judged(
        "less", 0.95, evidence.runs_of(world, Routers(replicas=3, view_s=0.5), range(2)), full
    )
    assert 0.3 < less.found.mean < 1.5
    assert less.found.mean != 1.0
    (later,) = evidence.runs_of(world, Routers(), [1])
    assert later.stages == full[1].stages
    assert later.stages != full[0].stages


def test_an_unknown_world_is_the_users_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert evidence.main(["--worlds", "nowhere"]) == 2
    assert "'nowhere' is not known" in capsys.readouterr().err
