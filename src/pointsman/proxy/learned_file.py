"""The small file in which what was learned survives a restart, and the one beside it for what caches hold."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from pointsman.config import Learned
from pointsman.endpoints.pool import Pool
from pointsman.errors import PointsmanError, SettingsError
from pointsman.predictor import state as states
from pointsman.predictor.state import StateError
from pointsman.prefix import snapshot as snapshots
from pointsman.prefix.snapshot import Holder, Snapshot, SnapshotError
from pointsman.scheduling.scheduler import Scheduler
from pointsman.types import Clock

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_BYTES = 4 * 1024 * 1024
"""A file of what was learned that is larger is none of ours."""
SUFFIX = ".prefixes"
PREFIXES_EVERY = 3
"""It is a hundred times as large as the other file, and what is in it lasts: every third time will do."""


class LearnedFile:
    """Reads both at start, writes them now and then and at the end; never on the event loop.

    Nothing about it stops the gateway: who cannot read it learns from nothing, who cannot write it says so.
    """

    def __init__(self, settings: Learned, pool: Pool, scheduler: Scheduler, wall: Clock) -> None:
        """``wall`` gives seconds since 1970, as fast as the clock of the others."""
        path = Path(settings.path)
        self._every_s = settings.every_s
        self._pool = pool
        self._scheduler = scheduler
        self._index = scheduler.services.prefix
        self._wall = wall
        self._learned = _File(path, MAX_BYTES)
        self._prefixes = _File(path.with_name(path.name + SUFFIX), snapshots.MAX_FILE_BYTES)
        self._failed: dict[_File, str] = {}
        if not path.parent.is_dir():
            raise SettingsError(
                f"learned.path: there is no directory {path.parent}; make it, or leave it empty"
            )

    async def load(self) -> None:
        """Take up what an earlier process left. The endpoints' pages have been read."""
        state = await self._read(self._learned, states.decode)
        if state is not None:
            self._scheduler.restore(state, self._passed_s(state.saved_at_s))
        snapshot = await self._read(self._prefixes, snapshots.decode)
        if snapshot is not None:
            self._load_prefixes(snapshot)

    def _load_prefixes(self, snapshot: Snapshot) -> None:
        """An endpoint that does not answer now may well be about to start anew."""
        reached = [member.endpoint for member in self._pool.members.values() if member.reached]
        try:
            loaded = snapshot.load(self._index, reached, self._passed_s(snapshot.saved_at_s))
        except SnapshotError as exc:
            self._lost(self._prefixes, exc)
            return
        if snapshot.holders:
            log.info("known from before what %d of %d caches hold", len(loaded), len(snapshot.holders))

    def _passed_s(self, saved_at_s: float) -> float:
        return max(0.0, self._wall() - saved_at_s)

    async def run(self) -> None:
        while True:
            for _ in range(PREFIXES_EVERY):
                await asyncio.sleep(self._every_s)
                await self._save_learned()
            await self._save_prefixes()

    async def save(self) -> None:
        """Write what is known now."""
        await self._save_learned()
        await self._save_prefixes()

    async def _save_learned(self) -> None:
        endpoints = [member.endpoint for member in self._pool.members.values()]
        state = self._scheduler.state(endpoints, self._wall())
        if state is not None:
            await self._write(self._learned, [states.encode(state)])

    async def _save_prefixes(self) -> None:
        """Endpoint by endpoint, that requests need not wait for all of them."""
        block_tokens, members = self._index.block_tokens, self._pool.members
        saved_at_s, share = self._wall(), snapshots.MAX_BLOCK_BYTES // max(1, len(members))
        holders = []
        for member in list(members.values()):
            endpoint = member.endpoint
            if members.get(endpoint.name) is member and self._index.blocks(endpoint.slot):
                holders.append(Holder.of(self._index, endpoint, share))
                await asyncio.sleep(0)
        if holders and block_tokens == self._index.block_tokens:
            snapshot = Snapshot(saved_at_s, block_tokens, holders)
            await self._write(self._prefixes, await asyncio.to_thread(snapshots.encode, snapshot))

    async def _read(self, file: _File, decode: Callable[[bytes], T]) -> T | None:
        try:
            return await asyncio.to_thread(file.read, decode)
        except FileNotFoundError:
            return None
        except (OSError, StateError, SnapshotError) as exc:
            self._lost(file, exc)
            return None

    def _lost(self, file: _File, exc: OSError | PointsmanError) -> None:
        log.warning("what was learned before is lost: %s: %s", file.path, _why(exc))

    async def _write(self, file: _File, parts: Sequence[bytes]) -> None:
        try:
            await asyncio.to_thread(file.write, parts, file.next())
        except OSError as exc:
            failed = _why(exc)
            if failed not in self._failed.values():
                log.warning("what was learned cannot be kept: %s: %s", file.path, failed)
            self._failed[file] = failed
        else:
            self._failed.pop(file, None)


class _File:
    """All of it or what it was before, and never older bytes over newer ones."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path = path
        self._max_bytes = max_bytes
        self._writing = threading.Lock()
        self._number = self._written = 0

    def next(self) -> int:
        """A number for what is to be written, larger than those before."""
        self._number += 1
        return self._number

    def read(self, decode: Callable[[bytes], T]) -> T:
        if self.path.stat().st_size > self._max_bytes:
            raise StateError("is not a file of what was learned")
        return decode(self.path.read_bytes())

    def write(self, parts: Sequence[bytes], number: int) -> None:
        """For its owner's eyes: whoever has hashes can try prompts out on them."""
        beside = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        with self._writing:
            if number < self._written:
                return
            self._written = number
            try:
                with open(beside, "wb", opener=_private) as file:
                    file.writelines(parts)
                beside.replace(self.path)
            except OSError:
                beside.unlink(missing_ok=True)
                raise


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _why(exc: OSError | PointsmanError) -> str:
    return exc.message if isinstance(exc, PointsmanError) else exc.strerror or str(exc)
