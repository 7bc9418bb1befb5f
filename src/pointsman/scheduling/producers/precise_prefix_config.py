"""The parameters of precise-prefix-cache-producer as llm-d nests them (facts 5.2). What is None was not
given.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

Port = Annotated[int, Meta(ge=1, le=65535)]
Count = Annotated[int, Meta(ge=1)]

_UNITS = {
    **{f"{prefix}i": 1024**power for power, prefix in enumerate("KMGT", 1)},
    **{prefix: 1000**power for power, prefix in enumerate("kMGT", 1)},
    "K": 1000,
    "": 1,
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kKMGT]i?|)B?")


class Node(msgspec.Struct, rename="camel", forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """A mapping of the parameters."""


class TokenProcessor(Node):
    """How llm-d names blocks. It matters where an index is shared with it."""

    block_size_tokens: Count | None = None
    block_size: Count | None = None
    """Old name of the same."""
    hash_seed: str = ""
    hash_algorithm: Literal["cbor-fnv", "xxh64"] = "cbor-fnv"

    @property
    def block_tokens(self) -> int:
        return self.block_size_tokens or self.block_size or 16


class PodDiscovery(Node):
    """Where engines publish that do not say."""

    pod_label_selector: str = ""
    pod_namespace: str = ""
    socket_port: Port | None = None
    replay_socket_port: Annotated[int, Meta(ge=0, le=65535)] | None = None


class KvEvents(Node):
    """Where events come from."""

    zmq_endpoint: str = ""
    topic_filter: str | None = None
    concurrency: int | None = None
    engine_type: Literal["vllm", "sglang", ""] = ""
    discover_pods: bool = True
    pod_discovery_config: PodDiscovery = msgspec.field(default_factory=PodDiscovery)


class CostAwareMemory(Node):
    size: str = "2GiB"

    def __post_init__(self) -> None:
        self.size_bytes()

    def size_bytes(self) -> int:
        found = _SIZE.fullmatch(self.size.strip())
        if not found:
            raise ValueError(f"costAwareMemoryConfig.size: {self.size!r} is not a size such as 2GiB or 500MB")
        return int(float(found[1]) * _UNITS[found[2]])


class InMemory(Node):
    size: int | None = None
    pod_cache_size: int | None = None


class Redis(Node):
    """Redis, or Valkey."""

    address: str = ""
    backend_type: str = ""
    enable_rdma: bool = msgspec.field(default=False, name="enableRDMA")

    def url(self) -> str:
        """As Redis clients write it: an address of Valkey, or of nothing in particular, is one of Redis."""
        scheme, found, rest = self.address.partition("://")
        if not found:
            return f"redis://{self.address or '127.0.0.1:6379'}"
        return f"{ {'valkey': 'redis', 'valkeys': 'rediss'}.get(scheme, scheme) }://{rest}"


class KvBlockIndex(Node):
    """Where the index lies: the first that is given."""

    cost_aware_memory_config: CostAwareMemory | None = None
    redis_config: Redis | None = None
    valkey_config: Redis | None = None
    in_memory_config: InMemory | None = None
    enable_metrics: bool = False
    metrics_logging_interval: str | int = ""
    max_prefix_tokens_to_match: int | None = None

    @property
    def shared(self) -> Redis | None:
        """The server whose index is used; None where it is this router's own."""
        if self.cost_aware_memory_config is not None:
            return None
        return self.redis_config or self.valkey_config


class Backend(Node):
    """What a block in this tier is worth."""

    name: str
    weight: Annotated[float, Meta(ge=0)]


class Indexer(Node):
    kv_block_index_config: KvBlockIndex = msgspec.field(default_factory=KvBlockIndex)
    kv_cache_backend_configs: tuple[Backend, ...] | None = None
    token_processor_config: TokenProcessor | None = None
    prefix_store_config: dict[str, Any] | None = None
    tokenizers_pool_config: dict[str, Any] | None = None
