"""What docs/reference/engine.md says is so."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pointsman.sim.faults import Kind, parse
from pointsman.sim.profiles import PARAMETERS
from pointsman.sim.spec import FleetItem, expand, load_fleet

PAGE = (Path(__file__).parents[2] / "docs/reference/engine.md").read_text()


def first_cells(after: str) -> list[str]:
    """The first column of the table that follows ``after``."""
    table = PAGE.split(after, 1)[1].split("\n\n", 2)[1]
    return [row.split("|")[1].strip() for row in table.splitlines()[2:]]


def test_the_fleet_file_loads(tmp_path: Path) -> None:
    file = tmp_path / "fleet.yaml"
    file.write_text(re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[0])
    assert len(expand(load_fleet(file).engines)) == 7


def test_every_key_of_an_engine_is_described() -> None:
    keys = {
        key for cell in first_cells("Unknown keys stop the start") for key in re.findall(r"`(\w+)`", cell)
    }
    assert keys == set(FleetItem.__struct_fields__)


def test_the_faults_are_faults() -> None:
    shown = re.findall(r"-d '(\{.*?\})'", PAGE)
    assert [parse(json.loads(fault)).kind for fault in shown] == ["status", "stall", "crash"]
    assert [cell.strip("`") for cell in first_cells("curl -X DELETE")] == list(Kind.__args__)


def test_the_table_of_constants_is_the_programs() -> None:
    rows = re.findall(r"^\| ([a-z0-9-]+), ([a-z0-9.-]+) \|(.*)\|$", PAGE, re.MULTILINE)
    assert len(rows) == len(PARAMETERS)
    for accelerator, model, rest in rows:
        p = PARAMETERS[accelerator, model]
        assert [float(cell.replace(",", "")) for cell in rest.split("|")] == pytest.approx(
            [
                p.base_s * 1e3,
                p.sequence_s * 1e6,
                p.context_token_s * 1e9,
                p.prefill_tokens_per_s,
                p.prefill_step_s * 1e3,
                p.kv_tokens,
                p.max_sequences,
                p.block_tokens,
                p.step_tokens,
            ]
        )
