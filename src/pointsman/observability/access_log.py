"""One line for each request on standard output, written in batches: a system call a request would cost more
than the request's own decision.
"""

from __future__ import annotations

import asyncio
import time
from typing import TextIO

from pointsman.types import Decision, InferenceRequest, Outcome

FLUSH_S = 0.2
MAX_LINES = 500


class AccessLog:
    """An observer. Call ``flush`` at the end; ``run`` flushes now and then."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._lines: list[str] = []

    def __call__(self, request: InferenceRequest, decision: Decision | None, outcome: Outcome) -> None:
        usage = outcome.usage
        matched = decision.matched_tokens if decision else 0
        ttft = "-" if outcome.ttft_s is None else int(outcome.ttft_s * 1e6)
        self._lines.append(
            f"{int(time.time() * 1000)} id={request.id} path={request.path} model={request.model or '-'} "
            f"endpoint={outcome.endpoint or '-'} status={outcome.status} ending={outcome.ending._value_} "
            f"tries={outcome.tries} ttft_us={ttft} duration_us={int(outcome.duration_s * 1e6)} "
            f"prompt_tokens={usage.prompt_tokens} cached_tokens={usage.cached_tokens} "
            f"output_tokens={usage.output_tokens} matched_tokens={matched} "
            f"reason={outcome.reason or '-'}\n"
        )
        if len(self._lines) >= MAX_LINES:
            self.flush()

    def flush(self) -> None:
        if self._lines:
            self._out.write("".join(self._lines))
            self._out.flush()
            self._lines.clear()

    async def run(self) -> None:
        """Until cancelled."""
        try:
            while True:
                await asyncio.sleep(FLUSH_S)
                self.flush()
        finally:
            self.flush()
