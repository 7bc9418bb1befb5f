"""The file a trace goes to: written by a thread in batches, never larger than it may be.

At half of ``max_bytes`` the file becomes ``PATH.1``, in place of the one before it, and a new one is begun.
When it cannot be written the trace ends there, with one warning; requests go on.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from pointsman.errors import SettingsError

log = logging.getLogger(__name__)

FLUSH_S = 0.5
BATCH_BYTES = 64 * 1024
MAX_BATCHES = 128
"""That wait for the disk: 8 MB. What does not fit is dropped and counted."""
LAST_WORDS_S = 2.0


class TraceFile:
    """Takes lines. ``begin`` of ``open`` is called whenever a file begins, to write its first ones."""

    def __init__(self, path: str, max_bytes: int) -> None:
        self.path = Path(path)
        self._limit = max_bytes // 2
        self._begin: Callable[[], None] = lambda: None
        self._beginning = False
        self._lines: list[bytes] = []
        self._waiting = 0
        """Bytes of ``_lines``."""
        self._size = 0
        """Of the file with everything that is on its way there."""
        self._batches: queue.SimpleQueue[tuple[bool, bytes] | None] = queue.SimpleQueue()
        """Whether a new file begins here, and what is to be written."""
        self._out: BinaryIO | None = None
        self._new = False
        self._broken = False
        self.dropped = 0
        """Batches."""

    def open(self, begin: Callable[[], None]) -> None:
        """Begin the first file; ``SettingsError`` when that cannot be done."""
        try:
            self._open()
        except OSError as exc:
            raise SettingsError(f"trace.path: {self.path}: {exc.strerror}") from exc
        self._begin = begin
        self._first_lines()

    def write(self, line: bytes) -> None:
        """Take a line; it is in the file soon."""
        if self._broken:
            return
        if self._size + len(line) > self._limit and not self._beginning:
            self._hand_over()
            self._new = True
            self._size = 0
            self._first_lines()
        self._lines.append(line)
        self._waiting += len(line)
        self._size += len(line)
        if self._waiting >= BATCH_BYTES:
            self._hand_over()

    def _first_lines(self) -> None:
        self._beginning = True
        self._begin()
        self._beginning = False

    def _open(self) -> None:
        if self._out is not None:
            self._out.close()
        if self.path.is_file():  # and no device
            self.path.replace(self.path.with_name(self.path.name + ".1"))
        self._out = os.fdopen(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb", 0)

    def _hand_over(self) -> None:
        if not self._lines:
            return
        if self._new or self._batches.qsize() < MAX_BATCHES:
            self._batches.put((self._new, b"".join(self._lines)))
            self._new = False
        else:
            self.dropped += 1
            self._size -= self._waiting
        self._lines.clear()
        self._waiting = 0

    def _write(self) -> None:
        while (batch := self._batches.get()) is not None:
            if self._broken:
                continue
            new, data = batch
            try:
                if new:
                    self._open()
                assert self._out is not None
                rest = memoryview(data)
                while rest:
                    rest = rest[self._out.write(rest) :]
            except OSError as exc:
                self._broken = True
                log.warning("trace: %s cannot be written, it ends here: %s", self.path, exc.strerror)

    async def run(self, now_and_then: Callable[[], None], every_s: float) -> None:
        """Until cancelled; ``now_and_then`` is called every ``every_s`` seconds and at the end."""
        writer = threading.Thread(target=self._write, daemon=True, name="trace")
        writer.start()
        passed_s = 0.0
        try:
            while True:
                await asyncio.sleep(FLUSH_S)
                passed_s += FLUSH_S
                if passed_s >= every_s:
                    passed_s = 0.0
                    now_and_then()
                self._hand_over()
        finally:
            now_and_then()
            self._hand_over()
            self._batches.put(None)
            writer.join(LAST_WORDS_S)
            if self._out is not None and not writer.is_alive():
                self._out.close()
            if self.dropped:
                log.warning("trace: %d batches of lines dropped, the disk was too slow", self.dropped)
