"""What a policy says about KV events, the index of blocks and token ids, as settings of the parts that see to
them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import msgspec
from msgspec.structs import replace

from pointsman.config import Settings
from pointsman.config import SharedIndex as SharedSettings
from pointsman.errors import SettingsError
from pointsman.prefix.blocks_expected import SPECULATIVE_S
from pointsman.prefix.blocks_schemes import LlmD
from pointsman.prefix.precise import TIER_WEIGHTS, PreciseIndex
from pointsman.prefix.shared import SharedIndex, connect
from pointsman.scheduling.picker_config import LoadedConfig
from pointsman.scheduling.producers.precise_prefix import PrecisePrefixCache
from pointsman.scheduling.producers.tokens import TokenProducer
from pointsman.scheduling.signals import SENT


class Said(NamedTuple):
    """A setting, its value, and what of the policy says so."""

    section: str
    key: str
    value: Any
    where: str


def with_policy(settings: Settings, policy: LoadedConfig) -> Settings:
    """The settings with what the policy says. ``SettingsError`` where they say something else."""
    changes: dict[str, Any] = {}
    for said in _said(policy):
        section = changes.get(said.section) or getattr(settings, said.section)
        _check(said, getattr(section, said.key), _default(section, said.key))
        changes[said.section] = replace(section, **{said.key: said.value})
    return replace(settings, **changes) if changes else settings


class _Counted(NamedTuple):
    """How blocks count."""

    tier_weights: Mapping[str, float] = TIER_WEIGHTS
    expected_s: float = SPECULATIVE_S


def _counted(policy: LoadedConfig) -> _Counted:
    precise = policy.precise
    if precise is None:
        return _Counted()
    weights, expected_s = precise.tier_weights, precise.expected_s
    return _Counted(
        TIER_WEIGHTS if weights is None else weights, SPECULATIVE_S if expected_s is None else expected_s
    )


def precise_index(max_bytes: int, policy: LoadedConfig) -> PreciseIndex:
    """An index that counts blocks as the policy says."""
    counted = _counted(policy)
    return PreciseIndex(max_bytes=max_bytes, tier_weights=counted.tier_weights, expected_s=counted.expected_s)


def shared_index(settings: SharedSettings, policy: LoadedConfig) -> SharedIndex | None:
    """One that counts them in the same way; None where nothing is to be shared. ``SettingsError`` where it
    cannot be.
    """
    if not settings.redis:
        return None
    client = connect(settings.redis, settings.password_env)
    scheme = LlmD(settings.hash, settings.block_tokens, settings.hash_seed)
    return SharedIndex(client, scheme, *_counted(policy))


def _check(said: Said, value: Any, default: Any) -> None:
    if value not in (default, said.value):
        raise SettingsError(
            f"{said.section}.{said.key}: the picker configuration says something else ({said.where}); "
            "keep one of them"
        )


def _default(section: msgspec.Struct, key: str) -> Any:
    return next(field.default for field in msgspec.structs.fields(section) if field.name == key)


def _said(policy: LoadedConfig) -> Iterator[Said]:
    if policy.only_sent:
        yield Said("kv_events", "mode", "none", f"{SENT} is its only producer of prefix matches")
    if policy.precise is not None:
        yield from _events(policy.precise)
        yield from _index(policy.precise)
    if policy.tokens is not None:
        yield from _tokens(policy.tokens)


def _events(precise: PrecisePrefixCache) -> Iterator[Said]:
    events = precise.kv_events_config
    pods = events.pod_discovery_config
    at = "kvEventsConfig"
    if events.discover_pods:
        yield Said("kv_events", "mode", "all", f"{at}.discoverPods")
    elif not events.zmq_endpoint:
        yield Said("kv_events", "mode", "none", f"{at}: neither discoverPods nor zmqEndpoint")
    for key, value, name in (
        ("bind", events.zmq_endpoint or None, "zmqEndpoint"),
        ("topic", events.topic_filter, "topicFilter"),
        ("port", pods.socket_port, "podDiscoveryConfig.socketPort"),
        ("replay_port", pods.replay_socket_port, "podDiscoveryConfig.replaySocketPort"),
    ):
        if value is not None:
            yield Said("kv_events", key, value, f"{at}.{name}")


def _index(precise: PrecisePrefixCache) -> Iterator[Said]:
    blocks, at = precise.indexer_config.kv_block_index_config, "indexerConfig.kvBlockIndexConfig"
    memory, shared = blocks.cost_aware_memory_config, blocks.shared
    if memory is not None:
        yield Said("kv_events", "index_bytes", memory.size_bytes(), f"{at}.costAwareMemoryConfig.size")
    if shared is not None:
        names, of = precise.token_processor_config, "tokenProcessorConfig"
        yield Said("shared_index", "redis", shared.url(), f"{at}.redisConfig.address")
        yield Said("shared_index", "hash", names.hash_algorithm, f"{of}.hashAlgorithm")
        yield Said("shared_index", "hash_seed", names.hash_seed, f"{of}.hashSeed")
        yield Said("shared_index", "block_tokens", names.block_tokens, f"{of}.blockSizeTokens")


def _tokens(producer: TokenProducer) -> Iterator[Said]:
    vllm = producer.vllm
    if vllm is not None and vllm.url:
        yield Said("tokens", "url", vllm.url, "token-producer: vllm.url")
    if vllm is not None and (timeout_s := vllm.timeout_s()) is not None:
        yield Said("tokens", "budget_s", timeout_s, "token-producer: vllm.timeout")
