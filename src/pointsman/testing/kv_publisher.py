"""An engine's side of KV events over ZeroMQ on loopback: publishes, answers replays, and loses what a test
wants lost.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from types import TracebackType

import msgspec
import zmq

from pointsman.prefix.kv_socket import Inbox
from pointsman.prefix.kv_source import END

PATIENCE_S = 10.0
"""A test that waits longer has failed."""


def stored(hashes: Sequence[int], parent: int | None = None, block: int = 2, **fields: object) -> object:
    """An event as vLLM 0.32 writes it; the tokens of a block repeat its hash."""
    ids = [h % 1000 for h in hashes for _ in range(block)]
    return {
        "type": "BlockStored",
        "block_hashes": list(hashes),
        "parent_block_hash": parent,
        "token_ids": ids,
        "block_size": block,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        "extra_keys": [None] * len(hashes),
        "group_idx": 0,
        "kv_cache_spec_kind": "full_attention",
    } | fields


def removed(*hashes: int) -> object:
    return {"type": "BlockRemoved", "block_hashes": list(hashes), "medium": "GPU", "group_idx": 0}


CLEARED = {"type": "AllBlocksCleared"}


def batch(*events: object, ts: float = 0.0, rank: int | None = 0) -> bytes:
    """A message's payload."""
    return msgspec.msgpack.encode([ts, events, rank])


class Publisher:
    """``async with Publisher() as engine``. It listens at ``address``, unless it is to connect to a
    subscriber, and for replays at ``replay``.
    """

    def __init__(
        self,
        topic: str = "kv@127.0.0.1:8000@m",
        *,
        connect: str = "",
        buffer: int = 10_000,
        at: str = "tcp://127.0.0.1:*",
        replay_at: str = "tcp://127.0.0.1:*",
    ) -> None:
        self.topic = topic.encode()
        self.asked: list[int] = []
        """What replays were asked from."""
        self.answers_replays = True
        self.topic_in_replays = True
        self.address = self.replay = ""
        self._at = at
        self._replay_at = replay_at
        self._connect = connect
        self._ts = 0.0
        self._buffer = deque[tuple[int, bytes]](maxlen=buffer)
        self._seq = 0
        self._subscribed = asyncio.Event()

    async def __aenter__(self) -> Publisher:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._pub = self._context.socket(zmq.XPUB)
        if self._connect:
            self._pub.connect(self._connect)
        else:
            self._pub.bind(self._at)
            self.address = self._pub.getsockopt_string(zmq.LAST_ENDPOINT)
        router = self._context.socket(zmq.ROUTER)
        router.bind(self._replay_at)
        self.replay = router.getsockopt_string(zmq.LAST_ENDPOINT)
        self._router = router
        self._inboxes = [Inbox(self._pub, self._on_subscription), Inbox(router, self._on_request)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for inbox in self._inboxes:
            inbox.close()
        self._context.destroy(linger=0)

    async def subscribed(self) -> None:
        """Somebody listens."""
        await asyncio.wait_for(self._subscribed.wait(), PATIENCE_S)

    def publish(self, *events: object, rank: int | None = 0) -> None:
        self._ts += 1
        self.send(batch(*events, ts=self._ts, rank=rank))

    def lose(self, *events: object) -> None:
        """Publish, and have it lost on the way."""
        self._ts += 1
        self._buffer.append((self._seq, batch(*events, ts=self._ts)))
        self._seq += 1

    def send(self, payload: bytes) -> None:
        """Publish these bytes under the next number."""
        self._buffer.append((self._seq, payload))
        self.send_parts(self.topic, self._seq.to_bytes(8, "big"), payload)
        self._seq += 1

    def send_parts(self, *parts: bytes) -> None:
        self._pub.send_multipart(parts)

    def restart(self) -> None:
        """Numbers begin again, and what was published is forgotten."""
        self._seq = 0
        self._buffer.clear()

    def _on_subscription(self, parts: list[bytes]) -> None:
        if parts[0][:1] == b"\x01":
            self._subscribed.set()
        else:
            self._subscribed.clear()

    def _on_request(self, parts: list[bytes]) -> None:
        identity, empty, start = parts
        self.asked.append(int.from_bytes(start, "big"))
        if not self.answers_replays:
            return
        topic = (self.topic,) if self.topic_in_replays else ()
        for seq, payload in self._buffer:
            if seq >= self.asked[-1]:
                self._router.send_multipart([identity, empty, *topic, seq.to_bytes(8, "big"), payload])
        end = (b"",) if topic else ()
        self._router.send_multipart([identity, empty, *end, END.to_bytes(8, "big"), b""])
