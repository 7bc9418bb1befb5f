"""Every world loads, and the command says what became of it."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from bench.worlds.__main__ import main, tell
from bench.worlds.catalogue import FOLDER, KINDS, QUICK, load_worlds
from bench.worlds.report import line, markdown, to_json
from bench.worlds.verdict import Bar

from pointsman.bench.run import Load
from pointsman.twin.policies import policy
from pointsman.twin.seeds import mean_of


def test_every_file_is_a_world_and_says_what_it_is() -> None:
    worlds = load_worlds()
    assert {w.name for w in worlds} == {path.stem for path in FOLDER.glob("*/*.yaml")}
    assert {w.kind for w in worlds} == set(KINDS)
    assert len(worlds) >= 30
    for world in worlds:
        assert world.says.endswith("."), world.name
        assert world.rate > 0, world.name
        assert (world.bound_tok_s() is None) == (world.kind != "base"), world.name


def test_a_quick_look_has_each_kind() -> None:
    assert {world.kind for world in load_worlds(QUICK)} == set(KINDS)


@pytest.mark.parametrize(
    ("values", "at_least", "outcome"),
    [
        ([1.10, 1.11], True, "open"),  # two seeds: the interval is as wide as 12.7 standard errors
        ([1.10, 1.11, 1.12], True, "holds"),
        ([0.99, 1.00, 0.98], True, "misses"),
        ([0.99, 1.40, 0.98], True, "open"),
        ([1.2], True, "open"),
        ([0.5, 0.51, 0.52], False, "holds"),
        ([1.2, 1.21, 1.22], False, "misses"),
    ],
)
def test_a_bar_holds_only_with_all_of_its_interval(values: list[float], at_least: bool, outcome: str) -> None:
    assert Bar(name="x", found=mean_of(values), limit=1.05, at_least=at_least).outcome == outcome


def test_two_tiny_worlds_make_a_table() -> None:
    told = []
    for world in load_worlds(["base-25", "equal-25"]):
        short = (Load(rate=5, duration_s=2), Load(rate=10, duration_s=2))
        tiny = msgspec.structs.replace(world, scenario=msgspec.structs.replace(world.scenario, stages=short))
        policies = [policy(name) for name in ("least-cost", "llm-d-blend", "round-robin")]
        told.append(tell(tiny, policies, range(2)))
    verdicts, figures = markdown(told).split("\n\n")
    assert [row.split(" | ")[0] for row in verdicts.splitlines()[2:]] == ["| base-25", "| equal-25"]
    assert "round-robin" in figures.splitlines()[0]
    assert line(told[0]).startswith("base-25 ")
    mixed, equal = json.loads(to_json(told))["worlds"]
    assert [bar["limit"] for bar in mixed["judged"]["bars"]] == [1.0, 1.0, 0.88]
    assert [bar["limit"] for bar in equal["judged"]["bars"]] == [0.98, 1.02]
    own, llm_d, _ = (s["figures"]["output_tok_s"]["mean"] for s in equal["summaries"])
    assert own > 0
    assert equal["to_llm_d"]["mean"] == pytest.approx(own / llm_d, rel=0.1)


def test_a_world_there_is_none_of_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--worlds", "base-26"]) == 2
    said = capsys.readouterr().err
    assert "base-26" in said
    assert "base-25" in said


def test_all_files_are_in_a_folder_of_their_kind() -> None:
    assert not list(Path(FOLDER).glob("*.yaml"))
