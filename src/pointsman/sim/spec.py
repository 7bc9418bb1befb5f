"""What a simulated engine or fleet is made of, and the fleet file that says so."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
import yaml
from msgspec import Meta, structs
from xxhash import xxh64_intdigest

from pointsman.errors import SettingsError
from pointsman.registry import hint
from pointsman.sim.kv_layouts import Layout
from pointsman.sim.kv_sockets import beside, is_bound
from pointsman.sim.profiles import ACCELERATORS, GRANITE, MODELS, PARAMETERS, EngineParameters
from pointsman.sim.variants import Positive, Variants

Port: TypeAlias = Annotated[int, Meta(ge=0, le=65535)]
Count: TypeAlias = Annotated[int, Meta(ge=1)]
Endpoint: TypeAlias = Annotated[str, Meta(pattern=r"^(tcp://.+:\d{1,5}|ipc://.+)$")]
MAX_MODEL_LEN = 131_072


class KvEvents(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """How an engine publishes its KV events. Names and meanings are those of vLLM's ``--kv-events-config``
    where it has one.
    """

    endpoint: Endpoint = "tcp://*:5557"
    """``tcp://*:PORT`` and ``ipc://`` are bound, and so is port 0, a free one; to any other it connects."""
    replay_endpoint: Endpoint | Literal[""] = ""
    """Bound, whatever it is; empty: nobody can ask to hear something again."""
    topic: str = ""
    """Empty: ``kv@HOST:PORT@MODEL``."""
    buffer_steps: Count = 10_000
    """Messages that can be had again."""
    delay_s: Annotated[float, Meta(ge=0)] = 0.014
    """From the end of a step to its message, seconds of ours: vLLM's come up to 18 ms after the answer."""
    layout: Layout = "map"
    int_block_hashes: bool = True
    """False: as bytes, of the whole hash."""
    hash_algo: Literal["sha256_cbor", "opaque"] = "sha256_cbor"
    """``opaque`` costs less and cannot be computed by others."""

    def beside(self, place: int) -> KvEvents:
        """Those of the engine at that place among several alike: on other ports, if any is given."""
        return structs.replace(
            self,
            endpoint=beside(self.endpoint, place) if is_bound(self.endpoint) else self.endpoint,
            replay_endpoint=beside(self.replay_endpoint, place),
        )


class EngineSpec(Variants, frozen=True, kw_only=True, omit_defaults=False):
    """One simulated engine. Names and meanings are those of vLLM's options where there is one."""

    accelerator: str = ACCELERATORS[0]
    model: str | tuple[str, ...] = GRANITE
    """The name it serves; several are aliases of one model."""
    constants: str = ""
    """The model whose measured speed it has; by default ``model`` where that was measured."""
    measured: EngineParameters | None = None
    """One's own constants, as ``pointsman calibrate`` writes them; ``accelerator`` is then only a label."""
    name: str = ""
    port: Port = 0
    """0 picks a free one."""
    block_tokens: Count | None = None
    kv_tokens: Count | None = None
    kv_scale: Positive = 1.0
    """Factor on ``kv_tokens``: what is left of it, or more, than its profile says."""
    cpu_kv_tokens: Annotated[int, Meta(ge=0)] = 0
    """KV tokens that fit into the CPU's memory, where blocks go that the KV cache has no room for."""
    max_num_seqs: Count | None = None
    max_num_batched_tokens: Count | None = None
    max_model_len: Count | None = None
    max_num_queued_reqs: Count | None = None
    """Waiting and running together; more are answered 503. None: no limit."""
    enable_prefix_caching: bool = True
    kv_events: KvEvents | None = None
    """None: none are published."""
    data_parallel_rank: Annotated[int, Meta(ge=0)] = 0
    """Which of the servers of one deployment it is; added to the ports of its KV events."""
    loras: tuple[str, ...] = ()
    max_loras: Count = 4
    output_tokens: Count = 128
    """Length of an answer to a request that sets no limit."""
    labels: Mapping[str, str] = {}
    weight: Annotated[float, Meta(gt=0)] = 1.0
    """As the router's endpoints have it, where the simulation makes them."""
    price_per_hour: Annotated[float, Meta(ge=0)] = 0.0
    """What it costs, in any currency, the same for all; 0: not told."""
    watts: Annotated[float, Meta(ge=0)] = 0.0
    """What it draws, whatever it does; 0: not told."""

    @property
    def models(self) -> tuple[str, ...]:
        return (self.model,) if isinstance(self.model, str) else self.model

    def parameters(self) -> EngineParameters:
        """Its speed and limits; ``SettingsError`` when there is no such set."""
        found = self.measured or self._known()
        variants = self.variants()
        if variants.random:  # engines of a fleet are not random in the same way
            seed = xxh64_intdigest(self.name.encode(), self.seed)
            variants = structs.replace(variants, seed=seed)
        changes: dict[str, Any] = {
            "block_tokens": self.block_tokens,
            "kv_tokens": self.kv_tokens,
            "max_sequences": self.max_num_seqs,
            "step_tokens": self.max_num_batched_tokens,
            "prefix_caching": self.enable_prefix_caching,
            "cpu_kv_tokens": self.cpu_kv_tokens or None,
            "variants": variants if variants.said() else None,
        }
        parameters = structs.replace(found, **{key: v for key, v in changes.items() if v is not None})
        parameters = structs.replace(parameters, kv_tokens=round(parameters.kv_tokens * self.kv_scale))
        if not parameters.kv_blocks:
            raise SettingsError(
                f"kv_tokens: {parameters.kv_tokens} is less than one block of {parameters.block_tokens}"
            )
        if parameters.kv_blocks * parameters.block_tokens <= variants.num_speculative_tokens:
            raise SettingsError(
                f"num_speculative_tokens: {variants.num_speculative_tokens} drafted tokens leave no room in "
                f"kv_tokens: {parameters.kv_tokens}"
            )
        if variants.recompile_s and variants.batch_buckets != "hpu":
            raise SettingsError("recompile_s: only `batch_buckets: hpu` are compiled when met")
        return parameters

    def variants(self) -> Variants:
        """How it differs from the plain equation."""
        return Variants(**{field: getattr(self, field) for field in Variants.__struct_fields__})

    def _known(self) -> EngineParameters:
        if self.accelerator not in ACCELERATORS:
            raise SettingsError(
                f"accelerator: {self.accelerator!r} is not known{hint(self.accelerator, ACCELERATORS)}; "
                f"there are {', '.join(ACCELERATORS)}"
            )
        served = self.models[0].rpartition("/")[2]
        constants = self.constants or (served if served in MODELS else GRANITE)
        found = PARAMETERS.get((self.accelerator, constants))
        if found is None:
            measured = [model for accelerator, model in PARAMETERS if accelerator == self.accelerator]
            raise SettingsError(
                f"constants: {constants!r} was not measured on {self.accelerator}; "
                f"there is {', '.join(measured)}"
            )
        return found

    def context_tokens(self) -> int:
        """Longest prompt and answer together; never more than the KV cache holds."""
        parameters = self.parameters()
        kv_tokens = parameters.kv_blocks * parameters.block_tokens - self.num_speculative_tokens
        return min(self.max_model_len or MAX_MODEL_LEN, kv_tokens)


class FleetItem(EngineSpec, frozen=True, kw_only=True):
    """Several engines alike."""

    count: Count | None = None
    names: tuple[str, ...] = ()
    base_port: Port = 0
    """The first one's port; the others follow."""

    def engines(self) -> list[EngineSpec]:
        if self.count is not None and self.names and self.count != len(self.names):
            raise SettingsError(f"count: {self.count} engines but {len(self.names)} names; leave one out")
        single = {field: getattr(self, field) for field in EngineSpec.__struct_fields__}
        if self.count is None and not self.names:
            return [EngineSpec(**single | {"port": self.port or self.base_port})]
        if self.port:
            raise SettingsError("port: of several engines alike, give base_port instead")
        events = self.kv_events
        names = self.names or tuple(f"{self.name or self.accelerator}-{i}" for i in range(self.count or 0))
        return [
            EngineSpec(
                **single
                | {
                    "name": name,
                    "port": self.base_port and self.base_port + i,
                    "kv_events": events and events.beside(i),
                }
            )
            for i, name in enumerate(names)
        ]


class Pace(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """How simulated time becomes bytes on the wire."""

    speed: Annotated[float, Meta(gt=0)] = 1.0
    """Engine seconds in a wall-clock second."""
    tokens_per_chunk: Count = 1
    """Tokens a stream sends at once; the first token always goes at once."""


class FleetFile(Pace, frozen=True, kw_only=True):
    """A fleet file: pace, address, engines. A bare list is its ``engines``."""

    host: str = "127.0.0.1"
    engines: tuple[FleetItem, ...] = ()


def load_fleet(path: str | os.PathLike[str]) -> FleetFile:
    """The fleet file at ``path``; ``SettingsError`` naming the key that is wrong."""
    try:
        content: object = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as exc:
        raise SettingsError(f"fleet: cannot read {os.fspath(path)}: {exc}") from exc
    except yaml.YAMLError as exc:
        raise SettingsError(f"fleet: {os.fspath(path)} is not YAML: {exc}") from exc
    if isinstance(content, list):
        content = {"engines": content}
    try:
        fleet = msgspec.convert(content, FleetFile)
    except msgspec.ValidationError as exc:
        raise SettingsError(f"fleet: {os.fspath(path)}: {exc}") from exc
    if not fleet.engines:
        raise SettingsError(f"fleet: {os.fspath(path)}: `engines` is empty; list at least one")
    return fleet


def expand(items: Sequence[FleetItem]) -> list[EngineSpec]:
    """One spec an engine, each with a name of its own."""
    specs: list[EngineSpec] = []
    taken: set[str] = set()
    for spec in (spec for item in items for spec in item.engines()):
        wanted = name = spec.name or spec.accelerator
        number = 1
        while name in taken:
            number += 1
            name = f"{wanted}-{number}"
        if spec.name and name != spec.name:
            raise SettingsError(f"name: two engines are called {spec.name!r}")
        taken.add(name)
        specs.append(structs.replace(spec, name=name))
    return specs
