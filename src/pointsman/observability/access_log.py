"""One line for each request on standard output, written in batches: a system call a request would cost more
than the request's own decision.

Whoever reads the lines may stop reading; a thread waits for that, not the event loop, and what does not fit
meanwhile is dropped and counted.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from typing import TextIO

from pointsman.types import Decision, InferenceRequest, Outcome

log = logging.getLogger(__name__)

FLUSH_S = 0.2
MAX_LINES = 500
MAX_BATCHES = 64
"""Of ``MAX_LINES`` each, 10 MB or so, that wait for the reader."""
LAST_WORDS_S = 1.0


class AccessLog:
    """An observer. Call ``flush`` at the end; ``run`` flushes now and then."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._lines: list[str] = []
        self._batches: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.dropped = 0

    def __call__(self, request: InferenceRequest, decision: Decision | None, outcome: Outcome) -> None:
        usage = outcome.usage
        matched = decision.matched_tokens if decision else 0
        ttft = "-" if outcome.ttft_s is None else int(outcome.ttft_s * 1e6)
        self._lines.append(
            f"{int(time.time() * 1000)} id={request.id} path={request.path} model={_word(request.model)} "
            f"endpoint={outcome.endpoint or '-'} status={outcome.status} ending={outcome.ending._value_} "
            f"tries={outcome.tries} ttft_us={ttft} duration_us={int(outcome.duration_s * 1e6)} "
            f"prompt_tokens={usage.prompt_tokens} cached_tokens={usage.cached_tokens} "
            f"output_tokens={usage.output_tokens} matched_tokens={matched} "
            f"reason={outcome.reason or '-'}\n"
        )
        if len(self._lines) >= MAX_LINES:
            self._hand_over()

    def _hand_over(self) -> None:
        if self._lines:
            if self._batches.qsize() < MAX_BATCHES:
                self._batches.put("".join(self._lines))
            else:
                self.dropped += len(self._lines)
            self._lines.clear()

    def flush(self) -> None:
        """Write what there is, now. Not while ``run`` runs."""
        self._hand_over()
        self._batches.put(None)
        self._write()

    def _write(self) -> None:
        while (batch := self._batches.get()) is not None:
            self._out.write(batch)
            self._out.flush()

    async def run(self) -> None:
        """Until cancelled."""
        writer = threading.Thread(target=self._write, daemon=True, name="request log")
        writer.start()
        try:
            while True:
                await asyncio.sleep(FLUSH_S)
                self._hand_over()
        finally:
            self._hand_over()
            self._batches.put(None)
            writer.join(LAST_WORDS_S)
            if self.dropped:
                log.warning("request log: %d lines dropped, nobody read them", self.dropped)


def _word(text: str) -> str:
    """A client's text as one word of a line."""
    if text.isprintable() and " " not in text:
        return text or "-"
    return repr(text).replace(" ", "\\x20")
