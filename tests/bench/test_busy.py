"""A load generator that is itself the bottleneck says so."""

import asyncio
import time

from pointsman.bench.busy import Busy, Watch
from pointsman.bench.client import Record
from pointsman.bench.report import summarise
from pointsman.bench.run import result
from pointsman.bench.stream import Gaps


async def test_a_blocked_event_loop_is_seen():
    ticks = asyncio.Event()
    async with Watch(time.perf_counter, time.process_time) as watch:
        await asyncio.sleep(0)
        time.sleep(0.1)  # noqa: ASYNC251  # blocking the loop is the point
        asyncio.get_running_loop().call_later(0.05, ticks.set)
        await ticks.wait()
        busy = watch.busy()
    assert 0.05 < busy.lag_max_s < 5
    assert any("late" in warning for warning in busy.warnings())


def test_a_process_with_time_to_spare_warns_of_nothing():
    assert Busy(lag_p50_s=0.0005, lag_p99_s=0.003, lag_max_s=0.03, cpu_share=0.4).warnings() == []


def test_cpu_is_told_by_its_share():
    times = iter([0.0, 10.0])
    cpu = iter([1.0, 10.5])

    async def measure():
        async with Watch(lambda: next(times), lambda: next(cpu)) as watch:
            return watch.busy()

    busy = asyncio.run(measure())
    assert busy.cpu_share == 0.95
    assert "95% of a core" in busy.warnings()[0]


def test_late_sends_are_told_by_stage():
    idle = Busy(0.0, 0.0, 0.0, 0.0)
    late = summarise("rate 9", [Record(due_s=0.0, sent_s=0.5, first_s=1.0)], Gaps())
    prompt = summarise("rate 8", [Record(due_s=0.0, sent_s=0.001, first_s=1.0)], Gaps())
    (warning,) = result([late, prompt], idle).warnings
    assert warning.startswith("rate 9: requests went out up to 500 ms late")


def test_running_out_of_files_is_told():
    broken = summarise("rate 9", [Record(due_s=0.0, sent_s=0.0, error="open files")], Gaps())
    (warning,) = result([broken], Busy(0.0, 0.0, 0.0, 0.0)).warnings
    assert "ulimit -n" in warning
