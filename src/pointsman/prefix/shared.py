"""A block index in Redis or Valkey that several routers share, llm-d's among them.

Whoever hears an engine's events writes them, in batches, in a task of its own; whoever decides has fetched
the request's keys beforehand, while its prompt was tokenised. A decision itself never waits: ``match``
knows what has been fetched within the last two seconds, and speaks for no endpoint where that is nothing.

What was just sent counts at the router that sent it; others learn of it from the engine's events.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import Counter, OrderedDict, deque
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from pointsman.errors import SettingsError
from pointsman.prefix.blocks import Table
from pointsman.prefix.blocks_expected import SPECULATIVE_S, Expected
from pointsman.prefix.blocks_match import BlockMatch, Keys, find
from pointsman.prefix.blocks_schemes import LlmD
from pointsman.prefix.kv_wire import Cleared, Event, Removed, Stored
from pointsman.prefix.precise import FULL_ATTENTION, TIER_WEIGHTS
from pointsman.prefix.shared_layout import engine_key, field, holder, pairs, written_key, written_suffix
from pointsman.prefix.shared_scripts import MOST_ARGUMENTS, READ, WRITE, Arguments
from pointsman.types import InferenceRequest

if TYPE_CHECKING:  # an extra
    from redis.asyncio import Redis

log = logging.getLogger(__name__)

FRESH_S = 2.0
"""How long what was fetched counts: as long as what was sent does."""
MAX_QUEUED = 20_000
"""Events that wait to be written; what comes while so many do is lost, and counted."""
BATCH = 1000
"""Events that are written at once, and keys that are fetched at once."""
FIRST = 64
"""Keys that are fetched before the others: most prompts have no more than their beginning in common."""
MAX_CACHED = 500_000
"""Keys, of requests and of engines each, that are remembered here: about 100 MB."""
RETRY_S = 1.0
SILENT_S = 2.0
"""A server that says nothing for so long is away."""
FORGET_S = 600
"""How long the server remembers what an engine's hash stood for after the last holder is gone."""


def connect(url: str, password_env: str = "") -> Redis:
    """A client for ``redis://``, ``rediss://`` or ``unix://``; it connects when it is used. The password is
    in that environment variable, if any.
    """
    try:
        from redis.asyncio import from_url
    except ImportError as exc:
        raise SettingsError(
            "shared_index.redis: needs the Redis client: pip install 'pointsman[redis]'"
        ) from exc
    password = os.environ.get(password_env) if password_env else None
    if password_env and password is None:
        raise SettingsError(f"shared_index.password_env: environment variable {password_env} is not set")
    try:
        return from_url(url, password=password, socket_timeout=SILENT_S, socket_connect_timeout=SILENT_S)
    except ValueError as exc:  # its text may hold the password
        raise SettingsError(
            "shared_index.redis: is no address of a Redis server: begin it with redis://, rediss:// or unix://"
        ) from exc


_DONE = {"read": "read", "write": "written"}


class _Endpoint(NamedTuple):
    """What the index calls an endpoint, and whose blocks it has."""

    address: str
    model: str
    aliases: Sequence[str]


class SharedIndex:
    """Like ``PreciseIndex``, elsewhere. ``run`` writes, ``fetch`` reads; nothing else touches the network."""

    def __init__(
        self,
        client: Redis,
        scheme: LlmD,
        tier_weights: Mapping[str, float] = TIER_WEIGHTS,
        expected_s: float = SPECULATIVE_S,
    ) -> None:
        """``tier_weights`` and ``expected_s`` as of ``PreciseIndex``."""
        self.written = 0
        """Events."""
        self.lost = 0
        """Events that were not written: too many, or the server was away."""
        self.unknown = 0
        """Events dropped because what they build on is not known."""
        self.failures: Counter[str] = Counter()
        """Times that the server did not do what it was asked, by what that was: read or write."""
        self.joined: frozenset[int] = frozenset()
        """Endpoints that can be looked up."""
        self.slots: frozenset[int] = frozenset()
        """Endpoints that the index, as far as it was read, or an event speaks of."""
        self._client = client
        self._scheme = scheme
        self._slot_of: dict[str, int] = {}
        self._endpoints: dict[int, _Endpoint] = {}
        self._bases: dict[str, str] = {}
        """Of base models that have several names, by each the one that their blocks go by."""
        self._early: dict[int, list[Event]] = {}
        """Of endpoints whose model is not known yet."""
        self._told: set[int] = set()
        """Endpoints whose events come to us."""
        self._failing: set[str] = set()
        """What did not succeed the last time."""
        self._queue: deque[tuple[_Endpoint, Event]] = deque()
        self._filled, self._written = asyncio.Event(), asyncio.Event()
        self._written.set()
        self._keys_of: OrderedDict[int, tuple[int, ...]] = OrderedDict()
        """By an engine's hash, the keys it stands for."""
        self._holders: dict[str, Table] = {}
        self._fetched: OrderedDict[int, float] = OrderedDict()
        """Key to when it was fetched; the oldest first."""
        self._weights = tier_weights
        self._expected = Expected(1 << 24, expected_s)

    @property
    def waiting(self) -> int:
        """Events that are still to be written."""
        return len(self._queue) + sum(map(len, self._early.values()))

    # -- what the pool and the engines tell

    def add(self, slot: int, address: str, model: str, aliases: Sequence[str] = ()) -> None:
        """An endpoint has joined, or its models have changed; ``model`` is the name of its base model, to
        which the ``aliases`` lead, too. What it told before is written now.
        """
        self._endpoints[slot] = _Endpoint(address, model, aliases)
        self._slot_of[address] = slot
        self._placed()
        if slot in self._early:
            self.apply(slot, self._early.pop(slot), 0.0)

    def remove(self, slot: int) -> None:
        """The endpoint has left."""
        if slot in self._told:
            self.clear(slot)
        self._forget_holder(slot)
        self._early.pop(slot, None)
        self._told.discard(slot)
        endpoint = self._endpoints.pop(slot, None)
        if endpoint:
            self._slot_of.pop(endpoint.address, None)
        self.slots -= {slot}
        self._placed()

    def _placed(self) -> None:
        endpoints = self._endpoints.values()
        own = {endpoint.model for endpoint in endpoints}
        self.joined = frozenset(self._endpoints)
        self._bases = {alias: each.model for each in endpoints for alias in each.aliases if alias not in own}

    def clear(self, slot: int) -> None:
        """The endpoint lost its cache."""
        self.apply(slot, (Cleared(),), 0.0)
        self._forget_holder(slot)

    def _forget_holder(self, slot: int) -> None:
        self._expected.forget(slot)
        bit = 1 << slot
        for table in self._holders.values():
            for key in [key for key, bits in table.items() if bits & bit]:
                table[key] &= ~bit

    def apply(self, slot: int, events: Sequence[Event], now_s: float) -> None:
        """What one message of the endpoint says, to be written soon."""
        endpoint = self._endpoints.get(slot)
        room = max(0, MAX_QUEUED - self.waiting)
        self.lost += max(0, len(events) - room)
        if endpoint is None:
            self._early.setdefault(slot, []).extend(events[:room])
            return
        self._queue.extend((endpoint, event) for event in events[:room])
        if self._queue:
            self._filled.set()
            self._written.clear()
        self._told.add(slot)
        if slot not in self.slots:
            self.slots |= {slot}
        for event in events:
            if isinstance(event, Cleared):
                self._expected.forget(slot)

    # -- what requests ask

    def keys(self, request: InferenceRequest) -> Keys:
        """The request's keys, for blocks of the index's own size."""
        scheme = self._scheme
        size, salt = scheme.block_tokens, request.cache_salt
        model = self._bases.get(request.model, request.model)
        return {size: [scheme.of_prompt(prompt, model, salt, size) for prompt in request.tokenized]}

    async def fetch(self, keys: Keys, now_s: float) -> bool:
        """Read who holds these blocks; False where the server cannot be asked."""
        from redis.exceptions import RedisError

        self._expire(now_s)
        try:
            for those in keys[self._scheme.block_tokens]:
                new = [key for key in those if key not in self._fetched]
                at, count = 0, FIRST
                while at < len(new) and await self._fetch(new[at : at + count], now_s):
                    at, count = at + count, BATCH
        except (RedisError, OSError) as exc:
            self._failed("read", exc)
            return False
        self._succeeded("read")
        return True

    async def _fetch(self, keys: Sequence[int], now_s: float) -> bool:
        """False where a block is held by nobody: what comes after it does not matter."""
        runs: list[tuple[int, list[bytes]]] = await self._client.eval(READ, 0, " ".join(map(str, keys)))
        at = 0
        for count, fields in runs:
            for tier, bits in self._bits(fields).items():
                table = self._holders.setdefault(tier, {})
                for key in keys[at : at + count]:
                    table[key] = table.get(key, 0) | bits
            at += count
        self._fetched.update(dict.fromkeys(keys, now_s))
        return at == len(keys)

    def _bits(self, fields: Sequence[bytes]) -> dict[str, int]:
        """By tier, the bits of those who hold a block."""
        tiers: dict[str, int] = {}
        for each in filter(None, map(holder, fields)):
            slot = self._slot_of.get(each.pod_identifier)
            if slot is not None and not each.speculative:
                tiers[each.device_tier] = tiers.get(each.device_tier, 0) | 1 << slot
                if slot not in self.slots:
                    self.slots |= {slot}
        return tiers

    def match(self, request: InferenceRequest, now_s: float, keys: Keys | None = None) -> BlockMatch:
        """What has been fetched of the request's prompts."""
        self._expire(now_s)
        size = self._scheme.block_tokens
        if keys is None:
            keys = self.keys(request)
        known = all(chain[0] in self._fetched for chain in keys[size] if chain)
        slots = self.slots if known else frozenset()
        among = sum(1 << slot for slot in slots)
        tiers = [(self._weights.get(tier, 1.0), table) for tier, table in self._holders.items()]
        tiers.sort(key=lambda tier: tier[0], reverse=True)
        return find(request, keys, slots, {size: among}, tiers, self._expected, tables=self._holders)

    def sent(
        self, slot: int, request: InferenceRequest, now_s: float, match: BlockMatch | None = None
    ) -> None:
        """The request goes to ``slot``."""
        found = match or self.match(request, now_s)
        for chain, told in found.chains(slot, self._scheme.block_tokens):
            self._expected.add(slot, chain[told:], now_s)

    def _expire(self, now_s: float) -> None:
        self._expected.expire(now_s)
        fetched = self._fetched
        while fetched:
            key, at_s = next(iter(fetched.items()))
            if at_s > now_s - FRESH_S and len(fetched) <= MAX_CACHED:
                return
            del fetched[key]
            for table in self._holders.values():
                table.pop(key, None)

    # -- writing

    async def run(self) -> None:
        """Write what comes, until cancelled. While the server is away it is kept, as far as there is room."""
        from redis.exceptions import ConnectionError as Away
        from redis.exceptions import RedisError
        from redis.exceptions import TimeoutError as TooLate

        while True:
            await self._filled.wait()
            batch = list(islice(self._queue, BATCH))
            try:
                await self._write(batch)
            except (Away, TooLate, OSError) as exc:
                self._failed("write", exc)
                await asyncio.sleep(RETRY_S)
                continue
            except RedisError as exc:  # it would be the same the next time
                self._failed("write", exc)
                self.lost += len(batch)
            else:
                self._succeeded("write")
                self.written += len(batch)
            for _ in batch:
                self._queue.popleft()
            if not self._queue:
                self._filled.clear()
                self._written.set()

    async def close(self) -> None:
        """No more connections."""
        await self._client.aclose()

    def _failed(self, doing: str, exc: Exception) -> None:
        """Said once, until it succeeds again."""
        self.failures[doing] += 1
        if doing not in self._failing:
            self._failing.add(doing)
            log.warning("the shared index cannot be %s: %s; going on without it", _DONE[doing], exc)

    def _succeeded(self, doing: str) -> None:
        if doing in self._failing:
            self._failing.remove(doing)
            log.info("the shared index can be %s again", _DONE[doing])

    async def drain(self) -> None:
        """Until everything that was told has been written; ``run`` does it."""
        await self._written.wait()

    async def _write(self, batch: Sequence[tuple[_Endpoint, Event]]) -> None:
        """Nothing in it harms when it is done twice."""
        await self._learn(batch)
        emptied: dict[int, tuple[int, ...]] = {}
        arguments: Arguments = []
        for endpoint, event in batch:
            if isinstance(event, Cleared):
                await self._change(arguments)
                await self._clear(endpoint.address)
            elif isinstance(event, Stored):
                stored = self._stored(event, endpoint.model)
                for engine_hash, _, _ in stored:
                    emptied.pop(engine_hash, None)
                arguments += self._head("stored", endpoint.address, event.medium, event.group, len(stored))
                for engine_hash, key, place in stored:
                    arguments += (key, engine_hash, place)
            elif isinstance(event, Removed):
                gone = {engine_hash: self._keys_of.get(engine_hash, ()) for engine_hash in event.hashes}
                emptied.update(gone)
                keys = [key for those in gone.values() for key in those]
                arguments += self._head("removed", endpoint.address, event.medium, event.group, len(keys))
                arguments += keys
            if len(arguments) >= MOST_ARGUMENTS:
                await self._change(arguments)
        await self._change(arguments)
        await self._forget(emptied)

    def _head(self, what: str, address: str, tier: str, group: int | None, count: int) -> Arguments:
        """Of so many blocks."""
        group = group or 0
        return [what, field(address, tier, group), written_key(address), written_suffix(tier, group), count]

    async def _change(self, arguments: Arguments) -> None:
        """Have it done, and forget the arguments."""
        if arguments:
            await self._client.eval(WRITE, 0, *arguments)
            arguments.clear()

    async def _learn(self, batch: Sequence[tuple[_Endpoint, Event]]) -> None:
        """What the hashes stand for that the events build on, as far as others have written it."""
        wanted: dict[int, None] = {}
        for _, event in batch:
            if isinstance(event, Removed) or (isinstance(event, Stored) and not event.token_ids):
                wanted.update(dict.fromkeys(event.hashes))
            elif isinstance(event, Stored) and event.parent is not None:
                wanted[event.parent] = None
        missing = [engine_hash for engine_hash in wanted if engine_hash not in self._keys_of]
        if missing:
            pipeline = self._client.pipeline(transaction=False)
            for engine_hash in missing:
                pipeline.zrange(engine_key(engine_hash), 0, -1)
            for engine_hash, keys in zip(missing, await pipeline.execute(), strict=True):
                if keys:
                    self._know(engine_hash, tuple(map(int, keys)))

    def _stored(self, event: Stored, model: str) -> list[tuple[int, int, int]]:
        """Engine hash, key, place of all that a store says; nothing where it cannot be told."""
        if event.kind not in FULL_ATTENTION:
            return []
        if not event.token_ids:
            return [(h, key, i) for h in event.hashes for i, key in enumerate(self._keys_of.get(h, ()))]
        parent = None
        if event.parent is not None:
            before = self._keys_of.get(event.parent)
            if not before:
                self.unknown += 1
                return []
            parent = before[-1]
        keys = self._scheme.of_event(event, parent, event.lora or model)
        found = list(pairs(event.hashes, keys))
        together: dict[int, list[int]] = {}
        for engine_hash, key, _ in found:
            together.setdefault(engine_hash, []).append(key)
        for engine_hash, those in together.items():
            self._know(engine_hash, tuple(those))
        return found

    def _know(self, engine_hash: int, keys: tuple[int, ...]) -> None:
        self._keys_of[engine_hash] = keys
        self._keys_of.move_to_end(engine_hash)
        if len(self._keys_of) > MAX_CACHED:
            self._keys_of.popitem(last=False)

    async def _forget(self, emptied: dict[int, tuple[int, ...]]) -> None:
        """Hashes whose blocks nobody holds any more are forgotten after a while: meanwhile somebody else may
        be storing them again.
        """
        asked = [(engine_hash, keys) for engine_hash, keys in emptied.items() if keys]
        if not asked:
            return
        pipeline = self._client.pipeline(transaction=False)
        for _, keys in asked:
            pipeline.exists(*map(str, keys))
        left = await pipeline.execute()
        for (engine_hash, _), count in zip(asked, left, strict=True):
            if not count:
                pipeline.expire(engine_key(engine_hash), FORGET_S)
        await pipeline.execute()

    async def _clear(self, address: str) -> None:
        """In time proportional to what we wrote for it."""
        while members := await self._client.spop(written_key(address), BATCH):
            pipeline = self._client.pipeline(transaction=False)
            for member in members:
                key, group, tier = bytes(member).decode().split(" ", 2)  # type: ignore[arg-type]  # a list, with a count
                pipeline.hdel(key, field(address, tier, int(group)))
            await pipeline.execute()
