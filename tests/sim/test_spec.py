"""Fleet files."""

from __future__ import annotations

from pathlib import Path

import pytest

from pointsman.errors import SettingsError
from pointsman.sim.profiles import GRANITE, PARAMETERS, SARVAM
from pointsman.sim.spec import EngineSpec, FleetItem, expand, load_fleet


def fleet_file(folder: Path, text: str) -> Path:
    path = folder / "fleet.yaml"
    path.write_text(text)
    return path


def test_a_fleet_file_says_how_many_of_what(tmp_path: Path) -> None:
    text = """
    speed: 10
    tokens_per_chunk: 5
    engines:
      - {accelerator: h100-nvl, count: 2, base_port: 9000, labels: {zone: a}}
      - {accelerator: gaudi3, names: [left, right], kv_tokens: 1000, block_tokens: 32, max_num_seqs: 3}
      - {accelerator: mi325x, model: [org/sarvam-30b, alias], port: 9100}
    """
    fleet = load_fleet(fleet_file(tmp_path, text))
    assert (fleet.speed, fleet.tokens_per_chunk) == (10, 5)
    specs = expand(fleet.engines)
    assert [(s.name, s.port) for s in specs] == [
        ("h100-nvl-0", 9000),
        ("h100-nvl-1", 9001),
        ("left", 0),
        ("right", 0),
        ("mi325x", 9100),
    ]
    assert specs[0].labels == {"zone": "a"}
    assert specs[0].parameters() == PARAMETERS["h100-nvl", GRANITE]
    small = specs[2].parameters()
    assert (small.kv_blocks, small.block_tokens, small.max_sequences) == (31, 32, 3)
    assert specs[2].context_tokens() == 992
    assert specs[4].parameters() == PARAMETERS["mi325x", SARVAM]
    assert specs[4].models == ("org/sarvam-30b", "alias")


def test_a_bare_list_is_a_fleet(tmp_path: Path) -> None:
    fleet = load_fleet(fleet_file(tmp_path, "- accelerator: h100-nvl\n- accelerator: h100-nvl\n"))
    assert [s.name for s in expand(fleet.engines)] == ["h100-nvl", "h100-nvl-2"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("engines: [{acelerator: gaudi3}]", "`acelerator`"),
        ("sped: 3\nengines: [{}]", "`sped`"),
        ("engines: [{count: 0}]", "count"),
        ("engines: []", "`engines` is empty"),
        ("speed: 0\nengines: [{}]", "speed"),
        ("engines: [", "not YAML"),
        ("engines: [{loras: 3}]", "loras"),
        ("engines: [{batch_buckets: tpu}]", "batch_buckets"),
        ("engines: [{step_jitter: 10}]", "step_jitter"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_fleet(fleet_file(tmp_path, text))
    assert named in caught.value.message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nowhere\.yaml"):
        load_fleet(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("item", "named"),
    [
        (FleetItem(accelerator="h100-nvI"), "did you mean h100-nvl"),
        (FleetItem(accelerator="gaudi3", constants=SARVAM), "not measured on gaudi3"),
        (FleetItem(kv_tokens=10), "kv_tokens"),
        (FleetItem(kv_tokens=1000, kv_scale=0.01), "kv_tokens"),
        (FleetItem(kv_tokens=16, num_speculative_tokens=20), "num_speculative_tokens"),
        (FleetItem(recompile_s=3, batch_buckets="cuda-graph"), "recompile_s"),
    ],
)
def test_an_engine_that_cannot_be_is_named(item: EngineSpec, named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        item.parameters()


@pytest.mark.parametrize(
    "item",
    [
        FleetItem(count=2, port=9000),
        FleetItem(count=3, names=("a", "b")),
        FleetItem(names=("a", "a")),
    ],
)
def test_contradictions_are_refused(item: FleetItem) -> None:
    with pytest.raises(SettingsError):
        expand([item])


def test_a_fleet_file_may_bring_constants_of_its_own(tmp_path: Path) -> None:
    text = """
    - accelerator: my-card
      count: 2
      kv_tokens: 3200
      measured: {base_s: .01, sequence_s: 1.0e-5, context_token_s: 1.0e-8, prefill_tokens_per_s: 5000,
                 prefill_step_s: 0, kv_tokens: 100000, max_sequences: 64, block_tokens: 16}
    """
    first, second = expand(load_fleet(fleet_file(tmp_path, text)).engines)
    assert (first.name, second.name) == ("my-card-0", "my-card-1")
    assert first.parameters() == second.parameters()
    assert (first.parameters().prefill_tokens_per_s, first.parameters().kv_blocks) == (5000, 200)


def test_variants_are_keys_of_an_engine(tmp_path: Path) -> None:
    text = """
    - accelerator: gaudi3
      count: 2
      batch_buckets: hpu
      recompile_s: 5
      num_speculative_tokens: 3
      draft_acceptance: [8, 2]
      draft_cost: 0.05
      prefill_doubling_tokens: 24000
      step_jitter: 0.1
      kv_scale: 0.7
      max_num_batched_tokens: 2048
      seed: 3
    """
    first, second = (spec.parameters() for spec in expand(load_fleet(fleet_file(tmp_path, text)).engines))
    assert (first.kv_tokens, first.step_tokens) == (333_900, 2048)
    said = dict(first.variants.said())
    assert said.pop("seed") != second.variants.seed
    assert said == {
        "batch_buckets": "hpu",
        "recompile_s": 5,
        "num_speculative_tokens": 3,
        "draft_acceptance": (8, 2),
        "draft_cost": 0.05,
        "prefill_doubling_tokens": 24000,
        "step_jitter": 0.1,
    }


def test_the_seed_and_the_name_decide_what_is_random() -> None:
    seeds = {
        (seed, name): EngineSpec(step_jitter=0.1, seed=seed, name=name).parameters().variants.seed
        for seed in (0, 1)
        for name in ("a", "b")
    }
    assert len(set(seeds.values())) == 4
    assert EngineSpec(step_jitter=0.1, seed=1, name="b").parameters().variants.seed == seeds[1, "b"]
    assert EngineSpec(name="a").parameters() == EngineSpec(name="b").parameters()


def test_speculation_needs_room_for_what_it_drafts() -> None:
    plain, speculative = EngineSpec(kv_tokens=1600), EngineSpec(kv_tokens=1600, num_speculative_tokens=4)
    assert (plain.context_tokens(), speculative.context_tokens()) == (1600, 1596)
