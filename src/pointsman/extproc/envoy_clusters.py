"""Envoy's clusters: the endpoints as the picker lists them, and the picker itself."""

from __future__ import annotations

import ssl
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from pointsman.config import Endpoint, Settings, split_url
from pointsman.endpoints.discovery import file
from pointsman.endpoints.target import request_headers
from pointsman.errors import SettingsError
from pointsman.extproc.destinations import is_address
from pointsman.extproc.headers import DESTINATION

Tree: TypeAlias = dict[str, object]

ENDPOINTS = "endpoints"
PICKER = "picker"
CONTROL = "picker-control"
"""The picker again, over connections of their own: its lists and Envoy's log do not wait behind bodies."""

LB_METADATA = "envoy.lb"
TLS_MATCH = "envoy.transport_socket_match"
"""Where Envoy looks in an endpoint's metadata for how to speak to it."""
TLS_KEY = "tls"
HEADERS = "pointsman.headers"
"""Where an endpoint's own request headers are in its metadata."""

_MESSAGE_WINDOW_BYTES = 16 * 1024 * 1024
_KEEPALIVE = {"keepalive_probes": 3, "keepalive_time": 60, "keepalive_interval": 10}


def any_(kind: str, **fields: object) -> Tree:
    """An extension's configuration."""
    return {"@type": f"type.googleapis.com/envoy.extensions.{kind}", **fields}


def address(where: str, *, ipv4_too: bool = False) -> Tree:
    """``unix:PATH`` or ``HOST:PORT`` in Envoy's words; ``ipv4_too``: :: listens for IPv4 as well."""
    if where.startswith("unix:"):
        return {"pipe": {"path": where.removeprefix("unix:")}}
    host, _, port = where.rpartition(":")
    host = host.strip("[]")
    compat = {"ipv4_compat": True} if ipv4_too and host == "::" else {}
    return {"socket_address": {"address": host, "port_value": int(port), **compat}}


def tls_name(endpoint: Endpoint) -> str:
    """What an https endpoint's TLS settings are called; equal settings have equal names."""
    if not endpoint.tls_verify:
        return "unverified"
    return " ".join(filter(None, ("verified", endpoint.tls_ca, _ip(endpoint))))


def _ip(endpoint: Endpoint) -> str:
    """The address in the endpoint's URL; empty where it has a name."""
    host = split_url(endpoint.url, "endpoints").host
    return host if is_address(host) else ""


def picker_clusters(settings: Settings, requests: str, control: str) -> Sequence[Tree]:
    """The picker at ``requests`` (decisions) and ``control`` (lists and logs)."""
    fast = settings.envoy.fast_lane
    tls = settings.picker.tls
    asked = _picker(PICKER, requests, http2=not fast, tls=tls)
    asked["health_checks"] = [_health(fast)]
    # No endpoint of it healthy: fail at once, open or closed as set, instead of waiting for a hung one.
    asked["common_lb_config"] = {"healthy_panic_threshold": {"value": 0}}
    return [asked, _picker(CONTROL, control, http2=True, tls=tls)]


def endpoints_cluster(settings: Settings) -> Tree:
    """The endpoints: those that the picker chooses; without its word, the one with the least requests."""
    upstream = settings.upstream
    endpoints = known_endpoints(settings)
    fast = settings.envoy.fast_lane
    header: Tree = {"header": DESTINATION}
    metadata: Tree = {"metadata": {"key": LB_METADATA, "path": [{"key": DESTINATION}]}}
    # One source: Envoy adds several up, and a retry would go to the same endpoint again.
    choice = any_(
        "load_balancing_policies.override_host.v3.OverrideHost",
        override_host_sources=[header if fast else metadata],
        fallback_policy=_policy(
            "least_request", any_("load_balancing_policies.least_request.v3.LeastRequest")
        ),
    )
    return {
        "name": ENDPOINTS,
        "type": "EDS",
        "connect_timeout": f"{upstream.connect_timeout_s:.3f}s",
        "eds_cluster_config": {
            "eds_config": {
                "resource_api_version": "V3",
                "api_config_source": {
                    "api_type": "GRPC",
                    "transport_api_version": "V3",
                    "grpc_services": [{"envoy_grpc": {"cluster_name": CONTROL}}],
                },
            }
        },
        "load_balancing_policy": _policy("override_host", choice),
        "circuit_breakers": _UNLIMITED,
        "upstream_connection_options": {"tcp_keepalive": _KEEPALIVE},
        "typed_extension_protocol_options": _http(
            {"http_protocol_options": {}},
            common_http_protocol_options={"idle_timeout": f"{upstream.idle_s:.3f}s"},
            http_filters=_own_headers(endpoints),
        ),
        "transport_socket_matches": _sockets(endpoints),
    }


def known_endpoints(settings: Settings) -> Sequence[Endpoint]:
    """Those of the settings and of the watched file as it is now."""
    watched = settings.discovery.file
    return [*settings.endpoints, *(file.read(watched) if watched else ())]


def _own_headers(endpoints: Sequence[Endpoint]) -> Sequence[Tree]:
    """A filter that adds each endpoint's own headers (credentials), which are in its metadata: it runs for
    each try, when the endpoint is known.
    """
    names = sorted({name.decode("latin-1") for e in endpoints for name in request_headers(e)})
    if not names:
        return []
    added = [
        {
            "append": {
                "header": {"key": name, "value": f"%UPSTREAM_METADATA({HEADERS}:{name})%"},
                "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
            }
        }
        for name in names
    ]
    mutation = any_("filters.http.header_mutation.v3.HeaderMutation", mutations={"request_mutations": added})
    codec = any_("filters.http.upstream_codec.v3.UpstreamCodec")
    return [
        {"name": "envoy.filters.http.header_mutation", "typed_config": mutation},
        {"name": "envoy.filters.http.upstream_codec", "typed_config": codec},
    ]


def _policy(name: str, config: Tree) -> Tree:
    extension = {"name": f"envoy.load_balancing_policies.{name}", "typed_config": config}
    return {"policies": [{"typed_extension_config": extension}]}


_UNLIMITED: Mapping[str, object] = {
    "thresholds": [
        {
            "max_connections": 1_000_000,
            "max_pending_requests": 1_000_000,
            "max_requests": 1_000_000,
            "max_retries": 10_000,
        }
    ]
}
"""Admission is the picker's; Envoy's own limits (1,024) would answer 503 in its place."""


def _http(explicit: Tree, **others: object) -> Tree:
    options = any_("upstreams.http.v3.HttpProtocolOptions", explicit_http_config=explicit, **others)
    return {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options}


def _sockets(endpoints: Sequence[Endpoint]) -> Sequence[Tree]:
    """How to speak TLS to endpoints, by the name their metadata carries; without one, no TLS.

    Endpoints of a watched file are not known yet: the two ways without a CA of their own are always there.
    """
    kinds = {tls_name(e): e for e in endpoints if e.url.startswith("https:")}
    unverified, verified = Endpoint(url="https://any", tls_verify=False), Endpoint(url="https://any")
    kinds.setdefault(tls_name(unverified), unverified)
    if _system_roots():
        kinds.setdefault(tls_name(verified), verified)
    sockets: list[Tree] = [
        {
            "name": name,
            "match": {TLS_KEY: name},
            "transport_socket": {"name": "envoy.transport_sockets.tls", "typed_config": _tls(endpoint)},
        }
        for name, endpoint in kinds.items()
    ]
    plain = any_("transport_sockets.raw_buffer.v3.RawBuffer")
    return [
        *sockets,
        {
            "name": "plain",
            "match": {},
            "transport_socket": {"name": "envoy.transport_sockets.raw_buffer", "typed_config": plain},
        },
    ]


def _system_roots() -> str:
    """The file of CA certificates that programs here trust; empty where there is none."""
    paths = ssl.get_default_verify_paths()
    return paths.cafile or ""


def _tls(endpoint: Endpoint) -> Tree:
    common: Tree = {"alpn_protocols": ["http/1.1"]}
    ip = _ip(endpoint)
    if endpoint.tls_verify:
        trusted = endpoint.tls_ca or _system_roots()
        if not trusted:
            raise SettingsError(
                f"endpoints: {endpoint.url}: tls_ca: there are no CA certificates here; name some"
            )
        names: Tree = {"san_type": "IP_ADDRESS", "matcher": {"exact": ip}}
        common["validation_context"] = {
            "trusted_ca": {"filename": str(Path(trusted).absolute())},
            "match_typed_subject_alt_names": [names] if ip else [],
        }
    return any_(
        "transport_sockets.tls.v3.UpstreamTlsContext",
        common_tls_context=common,
        auto_host_sni=not ip,
        auto_sni_san_validation=endpoint.tls_verify and not ip,
    )


def _picker(name: str, where: str, *, http2: bool, tls: bool) -> Tree:
    windows = {
        "initial_stream_window_size": _MESSAGE_WINDOW_BYTES,
        "initial_connection_window_size": 4 * _MESSAGE_WINDOW_BYTES,
    }
    protocol: Tree = {"http2_protocol_options": windows} if http2 else {"http_protocol_options": {}}
    local = where.startswith("unix:")
    is_name = not local and not is_address(where.rpartition(":")[0].strip("[]"))
    return {
        "name": name,
        "type": "STRICT_DNS" if is_name else "STATIC",
        "connect_timeout": "1s",
        "circuit_breakers": _UNLIMITED,
        "typed_extension_protocol_options": _http(protocol),
        **({"transport_socket": _PICKER_TLS} if tls and not local else {}),
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address(where)}}]}],
        },
    }


_PICKER_TLS: Mapping[str, object] = {
    "name": "envoy.transport_sockets.tls",
    "typed_config": any_(
        "transport_sockets.tls.v3.UpstreamTlsContext", common_tls_context={"alpn_protocols": ["h2"]}
    ),
}
"""A picker's certificate is self-signed unless it is given one, so it is not checked."""


def _health(fast: bool) -> Tree:
    how: Tree = (
        {"http_health_check": {"path": "/healthz"}}
        if fast
        else {"grpc_health_check": {"service_name": "envoy.service.ext_proc.v3.ExternalProcessor"}}
    )
    return {
        "timeout": "1s",
        "interval": "1s",
        "no_traffic_interval": "1s",
        "unhealthy_threshold": 2,
        "healthy_threshold": 1,
        **how,
    }
