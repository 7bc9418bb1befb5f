"""What Envoy is told: one listener for clients, the picker asked for each request, endpoints as the picker
lists them. Field names and values are Envoy's own (API v3, tried with 1.40).
"""

from __future__ import annotations

import resource
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import msgspec
import yaml

from pointsman.config import Envoy, Server, Settings
from pointsman.extproc.envoy_clusters import (
    CONTROL,
    ENDPOINTS,
    PICKER,
    Tree,
    address,
    any_,
    endpoints_cluster,
    picker_clusters,
)
from pointsman.extproc.envoy_routes import routes
from pointsman.extproc.headers import DESTINATION, DROPPED, FLIGHT, SERVED

Trees: TypeAlias = Sequence[Tree]

DECIDE = "/decide"
"""Before the path of a request that the fast lane asks about."""
AUTHZ = "envoy.filters.http.ext_authz"
EXT_PROC = "envoy.filters.http.ext_proc"

FOR_SIDECARS = (
    "x-prefiller-host-port",
    "x-encoder-hosts-ports",
    "x-data-parallel-host-port",
    "x-kv-cache-source-host-port",
)
STRIPPED = (DESTINATION, SERVED, DROPPED, FLIGHT, *FOR_SIDECARS)
"""The picker's to say. A client that could say them would steer requests to whatever address it names."""

READ_BY_AUTHZ = ("content-type", "cookie", "authorization", "x-request-id", "x-api-key")
READ_PREFIXES = ("x-llm-d-", "x-gateway-", "x-slo-", "x-session", "anthropic-")
"""Headers of the client that a decision of the fast lane may depend on."""

ACCESS_LOG = (
    '%START_TIME(%s%3f)% id=%REQ(X-REQUEST-ID)% method=%REQ(:METHOD)% path="%REQ(:PATH)%" '
    "protocol=%PROTOCOL% endpoint=%UPSTREAM_HOST% status=%RESPONSE_CODE% flags=%RESPONSE_FLAGS% "
    "tries=%UPSTREAM_REQUEST_ATTEMPT_COUNT% duration_ms=%DURATION% request_bytes=%BYTES_RECEIVED% "
    "response_bytes=%BYTES_SENT% details=%RESPONSE_CODE_DETAILS%\n"
)
MAX_HEAD_KB = 8192
MAX_BODY_BYTES = 2**32 - 1
WINDOW_BYTES = 1024 * 1024
"""Flow control of HTTP/2 connections: what a slow reader may leave in our memory for each stream."""


class Picker(msgspec.Struct, frozen=True, kw_only=True):
    """Where Envoy finds the picker: ``unix:PATH`` or ``HOST:PORT``."""

    requests: str
    """ext_proc over gRPC; in the fast lane ext_authz over HTTP."""
    control: str
    """Endpoints (EDS) and the access log (ALS) over gRPC; the same as ``requests`` for a lone picker."""


def bootstrap(settings: Settings, picker: Picker, *, folder: Path | None = None) -> Tree:
    """The whole configuration. With ``folder``, listener and clusters come from its files, which Envoy reads
    again when ``write_dynamic`` renews them, and the admin page is a socket beside them.
    """
    envoy = settings.envoy
    tree: Tree = {
        "node": {"id": "pointsman", "cluster": "pointsman"},
        "admin": {"address": address(f"127.0.0.1:{envoy.admin_port}")},
        "overload_manager": {"resource_monitors": [_connections(envoy)]},
    }
    asked = picker_clusters(settings, picker.requests, picker.control)
    if folder is None:
        tree["static_resources"] = {
            "listeners": [listener(settings)],
            "clusters": [endpoints_cluster(settings), *asked],
        }
    else:
        tree["static_resources"] = {"clusters": asked}
        tree["dynamic_resources"] = {
            f"{kind}_config": {
                "resource_api_version": "V3",
                "path_config_source": {"path": str(folder / f"{kind}.json")},
            }
            for kind in ("lds", "cds")
        }
    return tree


def write_dynamic(settings: Settings, folder: Path) -> None:
    """Listener and endpoints' cluster as files in ``folder``; each replaces the one before in one move."""
    certificate = folder / "certificate.json"
    files: dict[str, Trees] = {
        "cds.json": [endpoints_cluster(settings)],
        "certificate.json": [_certificate(settings.server)] if settings.server.tls_cert else [],
        "lds.json": [listener(settings, certificate)],
    }
    for name, resources in files.items():
        written = folder / f"{name}.new"
        written.write_bytes(msgspec.json.encode({"resources": [_typed(name, r) for r in resources]}))
        written.rename(folder / name)


def as_yaml(tree: Tree) -> str:
    """For people to read and for Envoy's ``-c FILE.yaml``."""
    return yaml.safe_dump(tree, sort_keys=False, width=110)


_TYPES = {
    "cds.json": "config.cluster.v3.Cluster",
    "lds.json": "config.listener.v3.Listener",
    "certificate.json": "extensions.transport_sockets.tls.v3.Secret",
}


def _typed(file: str, resource: Tree) -> Tree:
    return {"@type": f"type.googleapis.com/envoy.{_TYPES[file]}", **resource}


def _connections(envoy: Envoy) -> Tree:
    """Every connection is two files; more connections than files would end in errors at random."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = envoy.max_connections or max(100, files // 2 - 100)
    return {
        "name": "envoy.resource_monitors.global_downstream_max_connections",
        "typed_config": any_(
            "resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",
            max_active_downstream_connections=most,
        ),
    }


def listener(settings: Settings, certificate: Path | None = None) -> Tree:
    """The clients' port: HTTP/1.1 and HTTP/2, with TLS where there is a certificate. ``certificate`` is the
    file that Envoy is to watch for it.
    """
    server = settings.server
    chain: Tree = {"filters": [_filter("envoy.filters.network.http_connection_manager", _manager(settings))]}
    if server.tls_cert:
        chain["transport_socket"] = {
            "name": "envoy.transport_sockets.tls",
            "typed_config": any_(
                "transport_sockets.tls.v3.DownstreamTlsContext", common_tls_context=_tls(server, certificate)
            ),
        }
    return {
        "name": "clients",
        "address": address(_authority(server.host, server.port), ipv4_too=True),
        "per_connection_buffer_limit_bytes": WINDOW_BYTES,
        "filter_chains": [chain],
    }


def _authority(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _tls(server: Server, certificate: Path | None) -> Tree:
    tree: Tree = {"alpn_protocols": ["h2", "http/1.1"]}
    if certificate is None:
        tree["tls_certificates"] = [_pem_files(server)]
    else:
        source = {"path_config_source": {"path": str(certificate)}, "resource_api_version": "V3"}
        tree["tls_certificate_sds_secret_configs"] = [{"name": "server", "sds_config": source}]
    return tree


def _pem_files(server: Server) -> Tree:
    return {
        "certificate_chain": {"filename": str(Path(server.tls_cert).absolute())},
        "private_key": {"filename": str(Path(server.tls_key).absolute())},
    }


def _certificate(server: Server) -> Tree:
    """The certificate as a resource that Envoy reads again when its folder changes."""
    folder = str(Path(server.tls_cert).absolute().parent)
    return {
        "name": "server",
        "tls_certificate": {**_pem_files(server), "watched_directory": {"path": folder}},
    }


def _filter(name: str, config: Tree) -> Tree:
    return {"name": name, "typed_config": config}


def _manager(settings: Settings) -> Tree:
    server = settings.server
    strip = [{"remove": name} for name in STRIPPED]
    return any_(
        "filters.network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix="clients",
        codec_type="AUTO",
        server_header_transformation="PASS_THROUGH",
        use_remote_address=True,  # X-Forwarded-For tells of the client
        normalize_path=True,
        path_with_escaped_slashes_action="REJECT_REQUEST",
        generate_request_id=True,
        preserve_external_request_id=True,
        always_set_request_id_in_response=True,
        request_id_extension={  # a client's id stays as it came
            "typed_config": any_("request_id.uuid.v3.UuidRequestIdConfig", pack_trace_reason=False)
        },
        max_request_headers_kb=min(MAX_HEAD_KB, max(1, server.head_bytes // 1024)),
        common_http_protocol_options={"idle_timeout": _seconds(server.idle_timeout_s)},
        http2_protocol_options={
            "max_concurrent_streams": 1000,
            "initial_stream_window_size": WINDOW_BYTES,
            "initial_connection_window_size": 16 * WINDOW_BYTES,
        },
        request_headers_timeout=_seconds(server.head_timeout_s),
        stream_idle_timeout=_seconds(server.body_timeout_s),
        early_header_mutation_extensions=[
            _filter(
                "envoy.http.early_header_mutation.header_mutation",
                any_("http.early_header_mutation.header_mutation.v3.HeaderMutation", mutations=strip),
            )
        ],
        route_config=routes(settings),
        http_filters=[
            *_health(),
            _buffer(server),
            _authz(settings) if settings.envoy.fast_lane else _ext_proc(settings),
            _filter(
                "envoy.filters.http.router",
                any_("filters.http.router.v3.Router", suppress_envoy_headers=True),
            ),
        ],
        access_log=_logs(settings),
        upgrade_configs=[{"upgrade_type": "websocket", "enabled": True}],
    )


def _seconds(seconds: float) -> str:
    return f"{seconds:.3f}s"


def _health() -> Trees:
    """/health and /ping, as `serve` answers them: 200 while an endpoint can take requests."""
    return [
        _filter(
            "envoy.filters.http.health_check",
            any_(
                "filters.http.health_check.v3.HealthCheck",
                pass_through_mode=False,
                cluster_min_healthy_percentages={ENDPOINTS: {"value": 1}},
                headers=[{"name": ":path", "string_match": {"exact": path}}],
            ),
        )
        for path in ("/health", "/ping")
    ]


def _buffer(server: Server) -> Tree:
    """Whole bodies, as far as the limit goes: 413 beyond. The decision needs all of it anyway; and what came
    in chunks goes on with its length.
    """
    config = any_("filters.http.buffer.v3.Buffer", max_request_bytes=min(server.body_bytes, MAX_BODY_BYTES))
    return _filter("envoy.filters.http.buffer", config)


def _ext_proc(settings: Settings) -> Tree:
    """Ask with the whole body. The picker closes its stream with its answer, unless it must change or read
    the response; so a running response does not depend on it any more.

    With request bodies streamed (FULL_DUPLEX_STREAMED) Envoy enforces no message time-out, cannot fail open
    once body bytes are away, and drops Content-Length.
    """
    unseen = settings.picker.responses == "unseen"
    config = any_(
        "filters.http.ext_proc.v3.ExternalProcessor",
        grpc_service={"envoy_grpc": {"cluster_name": PICKER, "authority": PICKER}},
        failure_mode_allow=settings.envoy.picker_down == "open",
        status_on_error={"code": 503},
        message_timeout=_seconds(settings.envoy.decision_timeout_s),
        processing_mode={
            "request_header_mode": "SEND",
            "request_body_mode": "BUFFERED",
            "request_trailer_mode": "SKIP",
            "response_header_mode": "SKIP" if unseen else "SEND",
            "response_body_mode": "NONE" if unseen else "FULL_DUPLEX_STREAMED",
            "response_trailer_mode": "SKIP" if unseen else "SEND",
        },
        metadata_options={"receiving_namespaces": {"untyped": ["envoy.lb"]}},
    )
    return _filter(EXT_PROC, config)


def _authz(settings: Settings) -> Tree:
    """Ask over plain HTTP: an answer of 200 names the endpoint, any other goes to the client."""
    answer: Tree = {
        "allowed_upstream_headers": _exactly(DESTINATION, *FOR_SIDECARS),
        "allowed_client_headers": _exactly("content-type", "retry-after", DROPPED),
        "dynamic_metadata_from_headers": _exactly(FLIGHT),
    }
    config = any_(
        "filters.http.ext_authz.v3.ExtAuthz",
        transport_api_version="V3",
        http_service={
            "server_uri": {
                "uri": f"http://{PICKER}",
                "cluster": PICKER,
                "timeout": _seconds(settings.envoy.decision_timeout_s),
            },
            "path_prefix": DECIDE,
            "authorization_response": answer,
        },
        failure_mode_allow=settings.envoy.picker_down == "open",
        status_on_error={"code": 503},
        with_request_body={
            "max_request_bytes": min(settings.server.body_bytes, MAX_BODY_BYTES),
            "allow_partial_message": False,
        },
        allowed_headers={
            "patterns": [
                *_exactly(*READ_BY_AUTHZ, *settings.scheduling.session_headers)["patterns"],  # type: ignore[misc]
                *({"prefix": prefix} for prefix in READ_PREFIXES),
            ]
        },
    )
    return _filter(AUTHZ, config)


def _exactly(*names: str) -> Tree:
    return {"patterns": [{"exact": name} for name in names]}


def _logs(settings: Settings) -> Trees:
    """To the picker, which learns how requests ended; and a line each on standard output."""
    entries: Tree = {
        "log_name": "pointsman",
        "transport_api_version": "V3",
        "grpc_service": {"envoy_grpc": {"cluster_name": CONTROL}},
        "buffer_flush_interval": "0.050s",
    }
    logs = [
        _filter(
            "envoy.access_loggers.http_grpc",
            any_("access_loggers.grpc.v3.HttpGrpcAccessLogConfig", common_config=entries),
        )
    ]
    if settings.log.requests:
        lines = {"text_format_source": {"inline_string": ACCESS_LOG}}
        logs.append(
            _filter(
                "envoy.access_loggers.stdout",
                any_("access_loggers.stream.v3.StdoutAccessLog", log_format=lines),
            )
        )
    return [{**each, "filter": {"not_health_check_filter": {}}} for each in logs]
