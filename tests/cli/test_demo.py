"""``pointsman demo`` as a user runs it."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pointsman.cli.demo import VOID
from pointsman.cli.main import main

pytestmark = pytest.mark.usefixtures("no_stray_loop")

QUICK = ("--speed", "100", "--duration", "1")
"""So fast that the figures may be void, which is not what is tested here."""


def test_it_runs_four_policies_over_a_simulated_fleet_and_draws_them(tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        main(["demo", *QUICK, "--output", str(tmp_path)])
    told = capsys.readouterr().out
    assert left.value.code in (0, VOID)
    assert ("VOID" in told) == (left.value.code == VOID)
    assert "simulated" in told.split("\n")[0]
    lines = told.split("\n")
    head = next(i for i, line in enumerate(lines) if "TTFT p50" in line and "prefix hits" in line)
    assert re.search(r"to h100-nvl +to mi325x +to gaudi3$", lines[head])
    for name, line in zip(
        ("Kubernetes (random)", "round robin", "llm-d's blend", "Pointsman"),
        lines[head + 1 :],
        strict=False,
    ):
        assert line.startswith(name)
        failed, *requests = map(int, line.split()[-4:])
        assert (failed, sum(requests)) == (0, 85)
    assert lines[head + 5].startswith("learned: beside h100-nvl, mi325x ")
    assert "pointsman serve http://your-vllm-1:8000" in lines[-2]
    assert {path.name for path in tmp_path.iterdir()} == {"pointsman-demo.svg", "pointsman-demo.png"}


def _children(pid):
    """Command lines of the processes that ``pid`` started."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if (
                entry.name.isdigit()
                and int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == pid
            ):
                found.append(int(entry.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_ctrl_c_stops_the_demo_with_fleet_and_router(tmp_path):
    command = [sys.executable, "-m", "pointsman", "demo", "--keep", *QUICK, "--output", str(tmp_path)]
    demo = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with demo:
        assert demo.stdout
        for line in demo.stdout:
            if line.startswith("engines: http://"):
                break
        children = _children(demo.pid)
        assert len(children) == 2
        assert demo.poll() is None
        demo.send_signal(signal.SIGINT)
        rest = demo.stdout.read()
    assert demo.returncode == 130
    assert "Traceback" not in rest
    assert not any(map(_alive, children))


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--speed", "0"), "--speed: must be above 0"),
        (("--duration", "-1"), "--duration: must be above 0"),
        (("--output", "/proc/nowhere"), "--output: /proc/nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(args, says, capsys):
    with pytest.raises(SystemExit) as left:
        main(["demo", *args])
    told = capsys.readouterr()
    assert (left.value.code, told.out) == (2, "")
    assert says in told.err
    assert len(told.err.strip().split("\n")) == 1
