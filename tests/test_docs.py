"""The documentation: blocks marked ``run`` work, generated pages are up to date, links lead somewhere."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from pointsman.config import load
from pointsman.config import reference as settings_page
from pointsman.proxy.reference import page as metrics_page
from pointsman.scheduling.picker_config import load_picker_config
from pointsman.twin.reference import page as scenario_page

REPO = Path(__file__).parents[1]
DOCS = REPO / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = [*PAGES, *REPO.glob("*.md")]
RUN_S = 60
PORTS = ("8000", "8001", "8080", "8081")
"""Of the pages; a test takes free ones instead."""

SHOWN = {
    "quickstart.md": ('"object":"chat.completion"', r'"matched_tokens": [1-9]', r'"cached_tokens": [1-9]'),
    "howto/drain.md": ('"source": "admin"', '"draining": true', '"removed": "127.0.0.1:8000"'),
    "howto/switch-from-llm-d.md": ("ok: 2 endpoints, policy epp.yaml",),
    "howto/add-a-scorer.md": (),
    "howto/size-a-fleet.md": (r"llm-d-blend +[\d.]+ ± [\d.]+ +[\d.]+-[\d.]+, ", r"\d+ x error in stream"),
    "howto/plan.md": (r"as it happened +[\d,]+", r"\+ 2xmi325x +least-cost"),
    "simulate.md": (
        r"rate 85: 2,550 requests",
        r"llm-d-blend +[\d,]+ ± [\d,]+",
        r"Written to out: stages.txt, stages.jsonl, policies.svg",
        r'"request_id":"00000001"',
        r"Best: --policy 'llm-d-blend",
    ),
}
"""Pages that have blocks to run, and patterns of what they print."""


def blocks(page: Path, language: str) -> str:
    """The page's blocks of this language that are marked ``run``, as one script."""
    found = re.findall(rf"^```{language} run\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return "\n".join(found)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def run(script: str, folder: Path) -> str:
    """What the script prints; it must end well, and nothing it started outlives it."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    process = subprocess.Popen(
        [
            "bash",
            "-euo",
            "pipefail",
            "-c",
            f"trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT\n{script}",
        ],
        cwd=folder,
        env={**os.environ, "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        out, _ = process.communicate(timeout=RUN_S)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == 0, out
    return out


@pytest.mark.parametrize("name", SHOWN)
def test_blocks_that_can_be_run_do_what_the_page_says(name: str, tmp_path: Path) -> None:
    page = DOCS / name
    script, python = blocks(page, "bash"), blocks(page, "python")
    assert script or python
    if python:
        run(f"python - <<'END'\n{python}\nEND", tmp_path)
    ports = dict(zip(PORTS, map(str, free_ports(len(PORTS))), strict=True))
    out = run(re.sub(r"(?<=[: ])80[08][01]\b", lambda m: ports[m[0]], script), tmp_path)
    for port, free in ports.items():
        out = out.replace(free, port)
    for pattern in SHOWN[name]:
        assert re.search(pattern, out), out


def test_no_page_has_blocks_to_run_that_nobody_runs() -> None:
    marked = {
        str(page.relative_to(DOCS)) for page in PAGES if re.search(r"^```\w+ run$", page.read_text(), re.M)
    }
    assert marked == set(SHOWN)


def test_the_generated_pages_are_up_to_date() -> None:
    assert (DOCS / "reference" / "settings.md").read_text() == settings_page()
    assert (DOCS / "reference" / "metrics.md").read_text() == metrics_page()
    assert (DOCS / "reference" / "scenario.md").read_text() == scenario_page()


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: str(path.relative_to(REPO)))
def test_links_lead_somewhere(text: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", text.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (text.parent / target).exists(), target


def nav(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    else:
        for child in node.values() if isinstance(node, dict) else node:
            yield from nav(child)


def test_every_page_is_in_the_navigation() -> None:
    listed = list(nav(yaml.safe_load((REPO / "mkdocs.yml").read_text())["nav"]))
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in PAGES)


def test_examples_of_settings_and_picker_configurations_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPU_KEY", "secret")
    settings = tmp_path / "settings.yaml"
    kinds = []
    for page in PAGES:
        for example in re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            tree = yaml.safe_load(example)
            if "kind" in tree and "spot-last-scorer" not in example:
                load_picker_config(example)
                kinds.append("picker")
            elif "endpoints" in tree:
                settings.write_text(example)
                load(str(settings))
                kinds.append("settings")
    assert {"picker", "settings"} <= set(kinds)
