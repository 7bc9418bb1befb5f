"""The EndpointPickerConfig file as it is written: keys and types, nothing built yet."""

from __future__ import annotations

from typing import Any

import msgspec


class Node(msgspec.Struct, rename="camel", forbid_unknown_fields=True, kw_only=True):
    """A mapping of the file. Empty ones (null) are as good as absent."""


class Spec(Node):
    type: str
    name: str = ""
    parameters: dict[str, Any] | None = None


class Use(Node):
    plugin_ref: str
    weight: float | None = None


class ProfileSpec(Node):
    name: str
    plugins: list[Use] | None = None


class Ref(Node):
    plugin_ref: str = ""


class SourceSpec(Node):
    plugin_ref: str
    extractors: list[Ref] | None = None


class DataLayer(Node):
    inject_defaults: bool | None = None
    sources: list[SourceSpec] | None = None
    discovery: Ref | None = None
    peer_discovery: dict[str, Any] | None = None
    cross_replica_syncer_plugin_ref: str = ""
    cross_replica_sync_interval: str = ""


class RequestHandler(Node):
    parsers: list[Ref] | None = None


class FlowControl(Node):
    saturation_detector: Ref | None = None


class Document(Node):
    api_version: str
    kind: str
    feature_gates: list[str] | None = None
    plugins: list[Spec] | None = None
    scheduling_profiles: list[ProfileSpec] | None = None
    data_layer: DataLayer | None = None
    flow_control: dict[str, Any] | None = None
    request_handler: RequestHandler | None = None
    saturation_detector: Ref | None = None
    parser: Ref | None = None
