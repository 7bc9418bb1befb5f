"""What the recorder of ``trace.path`` adds to a request, hashing and encoding; a thread does the writing.

``python bench/micro/trace.py`` prints median and 99th percentile for prompts of several sizes.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

from decision import machine

from pointsman.api import prompts
from pointsman.observability.trace import Header, Recorder, Ruled
from pointsman.testing import fleet, request
from pointsman.types import Decision, Ending, Outcome, Prediction, Usage

OUTCOME = Outcome(
    ending=Ending.OK, status=200, endpoint="e0", ttft_s=0.25, duration_s=1.2, usage=Usage(7000, 250, 6000)
)


def measure(name: str, texts: Sequence[bytes], recorder: Recorder) -> None:
    endpoints = fleet(20)
    took_s = []
    for text in texts:
        one = prompts.prompt(text)
        asked = request(prompts=(one,), prompt_tokens=one.tokens)
        decision = Decision(
            request_id="r",
            model="m",
            at_s=1.0,
            profile="default",
            candidates=endpoints,
            chosen=endpoints[0],
            predicted=Prediction(0.01, 0.2, 0.01),
        )
        began_s = time.perf_counter()
        recorder(asked, decision, OUTCOME)
        took_s.append(time.perf_counter() - began_s)
    took_s.sort()
    median, p99 = took_s[len(took_s) // 2], took_s[len(took_s) * 99 // 100]
    print(f"{name:34} median {median * 1e6:5.1f} us  p99 {p99 * 1e6:5.1f} us")


def main() -> None:
    rng = random.Random(1)
    print(machine())
    lines: list[bytes] = []
    header = Header(unix_s=0.0, policy=Ruled(preset="least-cost"))
    recorder = Recorder(lines.append, lambda: header, list, lambda: 0.0)
    recorder.begin()
    prefixes = [rng.randbytes(24_000) for _ in range(150)]
    measure("0.5 KB, new", [rng.randbytes(512) for _ in range(5000)], recorder)
    measure("24 KB, new", prefixes, recorder)
    longer = [p + rng.randbytes(4800) for _ in range(30) for p in prefixes]
    measure("29 KB, 24 KB of it known", longer, recorder)
    measure("24 KB, known", prefixes * 30, recorder)
    print(f"{sum(map(len, lines)) / len(lines):.0f} bytes a request in the file")


if __name__ == "__main__":
    main()
