"""``pointsman conformance picker`` from the command line: exit codes, what it prints, pickers of others."""

from __future__ import annotations

import asyncio
import json
import shlex
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from pointsman.conformance import groups
from pointsman.conformance.case import CASES
from pointsman.conformance.cases import load_cases
from pointsman.conformance.start import LOG_FILE, free_ports

SERVE = Path(__file__).with_name("serve_picker.py")


async def conformance(*words: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pointsman", "conformance", "picker", *words),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


def command(which: str) -> str:
    return shlex.join([sys.executable, str(SERVE), which, "{config}", "{port}"])


async def test_own_picker_conforms() -> None:
    code, out, _ = await conformance("--json", "--cases", "scores-told", "--cases", "no-endpoints*")
    report = json.loads(out)
    assert [(case["id"], case["verdict"], case["reason"]) for case in report["cases"]] == [
        ("scores-told", "pass", ""),
        ("no-endpoints", "pass", ""),
        ("no-endpoints-headers-only", "pass", ""),
    ]
    assert (code, report["conforms"], report["summary"]) == (0, True, "3 passed")


async def test_a_failure_is_a_line_and_code_1() -> None:
    words = (
        "--command",
        command("clear-route-cache"),
        "--cases",
        "clear-route-cache",
        "--cases",
        "split-body",
    )
    code, out, _ = await conformance(*words)
    assert code == 1
    assert out.splitlines() == [
        "FAIL   clear-route-cache  clear_route_cache is not set",
        "pass   split-body",
        "1 passed, 1 failed",
    ]


async def test_what_an_extension_lacks_does_not_count() -> None:
    code, out, _ = await conformance("--command", command("buffered-request"), "--cases", "buffered-request")
    assert code == 0
    assert out.splitlines()[-1] == "1 lacking (extensions)"


async def test_flags_of_a_configuration_reach_the_command() -> None:
    code, out, _ = await conformance("--command", command("reference"), "--cases", "scores-told")
    assert (code, out.splitlines()[-1]) == (0, "1 passed")


async def test_a_picker_that_does_not_start_fails_with_its_last_words() -> None:
    script = "import sys; print('so it goes', file=sys.stderr); sys.exit('no such plugin')"
    words = shlex.join([sys.executable, "-c", script, "{config}", "{port}"])
    code, out, _ = await conformance("--command", words, "--cases", "split-body")
    assert code == 1
    assert out.splitlines()[0] == "FAIL   split-body  the picker does not start: no such plugin"


async def test_ports_that_a_command_does_not_take_skip_their_cases() -> None:
    code, out, _ = await conformance("--command", command("reference"), "--cases", "health")
    assert code == 0
    assert out.startswith("skip   health  where its health service listens is not known: --health-address")


def runs(pid: str) -> bool:
    return Path(f"/proc/{pid}").exists()


@asynccontextmanager
async def running(config: Path, port: int) -> AsyncIterator[None]:
    """The reference picker, started by somebody else."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(SERVE), "reference", str(config), str(port)), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert (await process.stdout.readline()).startswith(b"ready")
        yield
    finally:
        process.terminate()
        await process.communicate()


async def test_a_picker_that_runs_already_is_tested_on_its_configuration(tmp_path: Path) -> None:
    [port, first] = free_ports(2)
    shared = ("--write-config", str(tmp_path), "--first-port", str(first))
    code, out, _ = await conformance(*shared)
    assert code == 0
    written = [line.split()[0] for line in out.splitlines()[: len(groups.GROUPS)]]
    assert written == [str(tmp_path / name / groups.CONFIG_FILE) for name in groups.GROUPS]
    async with running(tmp_path / "load" / groups.CONFIG_FILE, port):
        words = ("--address", f"127.0.0.1:{port}", "--cases", "subset-*")
        code, out, _ = await conformance(*words, *shared)
    lines = out.splitlines()
    assert code == 0
    assert "skip   subset-switched-off   needs the picker on configuration 'whole-pool'" in lines
    assert lines[-1] == "7 passed, 1 skipped"


async def test_who_ends_the_suite_ends_the_picker_it_started(tmp_path: Path) -> None:
    suite = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pointsman", "conformance", "picker", "--cases", "load"),
        *("--command", command("reference"), "--write-config", str(tmp_path)),
        stdout=asyncio.subprocess.PIPE,
    )
    assert suite.stdout is not None
    assert (await suite.stdout.readline()).startswith(b"pass")
    pid = (tmp_path / "load" / LOG_FILE).read_text().split()[1]
    assert runs(pid)
    suite.terminate()
    await suite.communicate()
    assert suite.returncode == 128 + signal.SIGTERM
    assert not runs(pid)


async def test_list_names_every_case_and_its_source() -> None:
    load_cases()
    code, out, _ = await conformance("--list")
    assert code == 0
    for case in CASES.values():
        assert f"\n{case.id}  ({case.level}, {case.group or 'not tried'})\n  {case.required}\n" in out
    assert out.count("  source: ") == len(CASES)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--cases", "subset-of-two"), "--cases: no case, group or level is called 'subset-of-two'"),
        (("--command", "true {config}"), "--command: has no {port}"),
        (("--command", "picker '{config} {port}"), "--command: No closing quotation"),
        (("--command", "/no/such/picker {config} {port}"), "--command: '/no/such/picker' is no program"),
        (("--command", "true {config} {port}", "--address", "h:1"), "--address: is of a picker that runs"),
        (("--address", "localhost"), "--address: 'localhost' is not HOST:PORT"),
        (("--address", "h:1", "--group", "loads"), "--group: no configuration is called 'loads'"),
        (("--group", "load"), "--group: belongs to --address"),
        (("--health-address", "h:1"), "--health-address: belongs to --address"),
    ],
)
async def test_a_mistake_is_one_line_and_code_2(words: tuple[str, ...], says: str) -> None:
    code, out, err = await conformance(*words)
    assert (code, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1
