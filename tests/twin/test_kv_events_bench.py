"""The command behind docs/benchmarks/precise.md."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_table_has_a_row_for_each_way_of_knowing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import precise

    short = tmp_path / "short.yaml"
    text = (ROOT / "examples/twin/kv-events.yaml").read_text()
    short.write_text(text.replace("duration_s: 30", "duration_s: 1"))
    monkeypatch.setattr(precise, "SCENARIO", short)
    precise.main(["--seeds", "1", "--routers", "2"])
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split(" | ")[1] for row in rows] == list(precise.KNOWN_BY)
    assert {row.count("|") for row in rows} == {head.count("|")}
    page = (ROOT / "docs/benchmarks/precise.md").read_text()
    assert head in page
    assert all(f"| {routers} | {name} |" in page for routers in (1, 3) for name in precise.KNOWN_BY)
