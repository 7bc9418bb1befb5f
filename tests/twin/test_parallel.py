"""Tasks in processes: results in order, failures at once, nothing left behind. Tasks are expressions: other
processes cannot import the functions of a test.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pointsman.errors import SettingsError
from pointsman.twin.parallel import each

LONG_S = 60.0
PID = "__import__('os').getpid()"


@pytest.mark.parametrize("jobs", [1, 3])
def test_results_come_in_the_order_of_the_tasks(jobs: int) -> None:
    done: list[int] = []
    assert each(eval, [f"{i} * {i}" for i in range(7)], jobs, done.append) == [0, 1, 4, 9, 16, 25, 36]
    assert done == [1, 2, 3, 4, 5, 6, 7]


def test_several_jobs_are_several_processes_and_one_is_this_process() -> None:
    assert each(eval, [PID, PID], 1) == [os.getpid()] * 2
    assert os.getpid() not in each(eval, [PID, PID], 2)


def test_a_mistake_in_one_ends_the_others() -> None:
    before_s = time.monotonic()
    wait = f"__import__('time').sleep({LONG_S})"
    fail = "__import__('pointsman.sim.spec').sim.spec.EngineSpec(accelerator='abacus').parameters()"
    with pytest.raises(SettingsError, match="'abacus' is not known"):
        each(eval, [wait, fail, wait], 2)
    assert time.monotonic() - before_s < LONG_S / 2


def test_an_interrupt_ends_the_command_and_its_processes_without_a_traceback() -> None:
    command = [sys.executable, "-m", "pointsman", "simulate", "--capacity", "--seeds", "9", "--jobs", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        while len(started := children(process.pid)) < 3:  # the two and their resource tracker
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert out == ""
    until_s = time.monotonic() + 10
    while any(map(running, started)) and time.monotonic() < until_s:
        time.sleep(0.01)  # no child of ours: there is nothing to wait for
    assert not any(map(running, started))


def children(pid: int) -> set[int]:
    return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def running(pid: int) -> bool:
    """It may still wait to be collected by whoever adopted it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
