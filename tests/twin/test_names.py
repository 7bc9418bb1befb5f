"""Names and labels of endpoints play no part in what the default policy decides."""

from __future__ import annotations

from pointsman.bench.run import Load
from pointsman.bench.workloads import SharedPrefix
from pointsman.sim.spec import FleetItem
from pointsman.twin.policies import policy
from pointsman.twin.run import Simulation
from pointsman.twin.scenario import Scenario

KINDS = ("h100-nvl", "mi325x", "gaudi3")


def decisions(names: tuple[str, ...], labels: dict[str, str]) -> list[int]:
    """By their numbers, the slots that requests went to."""
    engines = tuple(
        FleetItem(accelerator=kind, name=name, count=2, labels=labels)
        for kind, name in zip(KINDS, names, strict=True)
    )
    scenario = Scenario(
        engines=engines,
        workload=SharedPrefix(12, 5, 4000, 200, 200),
        stages=(Load(rate=15, duration_s=20),),
        warm_up_stages=0,
    )
    simulation = Simulation(scenario, policy("least-cost"))
    slots = {name: member.endpoint.slot for name, member in simulation.pool.members.items()}
    (stage,) = simulation.run()
    return [slots[record.endpoint] for record in sorted(stage.records, key=lambda r: r.number)]


def test_renaming_accelerators_changes_no_decision() -> None:
    plain = decisions(KINDS, {})
    assert len(plain) == 300
    assert len(set(plain)) == 6
    swapped = decisions(("mi325x", "gaudi3", "h100-nvl"), {"accelerator": "h100-nvl"})
    assert swapped == plain
    assert decisions(("z", "m", "a"), {"llm-d.ai/engine-type": "vllm"}) == plain
