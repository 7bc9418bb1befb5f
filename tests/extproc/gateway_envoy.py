"""An Envoy set up as gateways set theirs up, not as ours is: one listener for each way to use a picker.

Facts of the configuration: llm-d's chart and the ext_proc reference of Envoy 1.40.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pointsman.config import Settings
from pointsman.extproc.envoy_process import WITH_PARENT, find_binary

DESTINATION = "x-gateway-destination-endpoint"
START_S = 30.0
TYPE = "type.googleapis.com/envoy.extensions."


def _any(kind: str, **fields: Any) -> dict[str, Any]:
    return {"@type": TYPE + kind, **fields}


def _grpc(cluster: str) -> dict[str, Any]:
    return {"envoy_grpc": {"cluster_name": cluster, "authority": cluster}}


def listener(
    name: str,
    cluster: str = "original_dst",
    *,
    request: str = "FULL_DUPLEX_STREAMED",
    response: str = "FULL_DUPLEX_STREAMED",
    trailers: str = "SEND",
    subset: Sequence[str] | None = None,
    retries: bool = False,
    timeout: str = "60s",
    idle_timeout: str = "300s",
) -> dict[str, Any]:
    """One that asks the picker in these body modes, and logs to it."""
    modes = {
        "request_header_mode": "SEND",
        "response_header_mode": "SEND",
        "request_body_mode": request,
        "response_body_mode": response,
        "request_trailer_mode": "SEND" if request == "FULL_DUPLEX_STREAMED" else "SKIP",
        "response_trailer_mode": trailers,
    }
    namespaces = {"untyped": ["envoy.lb", "envoy.lb.subset_hint"]}
    filters = [
        _any(
            "filters.http.ext_proc.v3.ExternalProcessor",
            grpc_service={**_grpc("picker"), "timeout": "10s"},
            processing_mode=modes,
            message_timeout="1000s",
            metadata_options={
                "forwarding_namespaces": namespaces,
                "receiving_namespaces": {"untyped": ["envoy.lb"]},
            },
        ),
        _any("filters.http.router.v3.Router"),
    ]
    if subset is not None:
        value = {f"{DESTINATION}-subset": list(subset)}
        hint = {"metadata_namespace": "envoy.lb.subset_hint", "value": value}
        filters.insert(0, _any("filters.http.set_metadata.v3.Config", metadata=[hint]))
    route: dict[str, Any] = {"cluster": cluster, "timeout": timeout}
    if retries:
        route["retry_policy"] = {"retry_on": "connect-failure", "num_retries": 2}
    log = {
        "log_name": name,
        "transport_api_version": "V3",
        "grpc_service": _grpc("picker"),
        "buffer_flush_interval": "0.02s",
    }
    status = ["grpc-status"]
    manager = _any(
        "filters.network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix=name,
        stream_idle_timeout=idle_timeout,
        route_config={
            "virtual_hosts": [
                {"name": "all", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "route": route}]}
            ]
        },
        http_filters=[{"name": f["@type"].rsplit(".", 1)[1], "typed_config": f} for f in filters],
        access_log=[
            {
                "name": "als",
                "typed_config": _any(
                    "access_loggers.grpc.v3.HttpGrpcAccessLogConfig",
                    common_config=log,
                    additional_response_headers_to_log=status,
                    additional_response_trailers_to_log=status,
                ),
            }
        ],
    )
    return {
        "name": name,
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": 0}},
        "per_connection_buffer_limit_bytes": 16 << 20,
        "filter_chains": [
            {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
        ],
    }


def _cluster(name: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "connect_timeout": "1s", **fields}


def _endpoints(name: str, addresses: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "cluster_name": name,
        "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}} for address in addresses]}],
    }


def bootstrap(socket: Path, listeners: Sequence[dict[str, Any]], ports: Sequence[int]) -> dict[str, Any]:
    """Envoy's configuration: the picker on ``socket``; the cluster ``listed`` has 127.0.0.1 at ``ports``."""
    h2 = _any("upstreams.http.v3.HttpProtocolOptions", explicit_http_config={"http2_protocol_options": {}})
    override = _any(
        "load_balancing_policies.override_host.v3.OverrideHost",
        override_host_sources=[{"header": DESTINATION}],
        fallback_policy={
            "policies": [
                {
                    "typed_extension_config": {
                        "name": "round_robin",
                        "typed_config": _any("load_balancing_policies.round_robin.v3.RoundRobin"),
                    }
                }
            ]
        },
    )
    listed = [{"socket_address": {"address": "127.0.0.1", "port_value": port}} for port in ports]
    h2c = {"typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": h2}}
    by_header: dict[str, Any] = {
        "type": "ORIGINAL_DST",
        "lb_policy": "CLUSTER_PROVIDED",
        "original_dst_lb_config": {"use_http_header": True, "http_header_name": DESTINATION},
    }
    clusters = [
        _cluster(
            "picker",
            **h2c,
            load_assignment=_endpoints("picker", [{"pipe": {"path": str(socket)}}]),
        ),
        _cluster("original_dst", **by_header),
        _cluster("original_dst_h2c", **by_header, **h2c),
        _cluster(
            "listed",
            load_assignment=_endpoints("listed", listed),
            load_balancing_policy={
                "policies": [{"typed_extension_config": {"name": "override", "typed_config": override}}]
            },
        ),
    ]
    return {
        "admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": 0}}},
        "static_resources": {"listeners": list(listeners), "clusters": clusters},
    }


@contextmanager
def running(
    folder: Path, socket: Path, listeners: Sequence[dict[str, Any]], ports: Sequence[int]
) -> Iterator[dict[str, int]]:
    """Envoy, until the block ends; gives each listener's port."""
    path, admin = folder / "envoy.json", folder / "admin"
    path.write_text(json.dumps(bootstrap(socket, listeners, ports)))
    command = [sys.executable, "-c", WITH_PARENT, find_binary(Settings()), "-c", str(path)]
    command += ["--concurrency", "1", "--disable-hot-restart", "--log-level", "error"]
    command += ["--admin-address-path", str(admin)]
    process = subprocess.Popen(command)
    try:
        yield _ports(process, admin, len(listeners))
    finally:
        process.terminate()
        process.wait(10)


def _ports(process: subprocess.Popen[bytes], admin: Path, count: int) -> dict[str, int]:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert process.poll() is None, "Envoy ended at its start"
        with suppress(OSError, ValueError, KeyError):
            with urllib.request.urlopen(
                f"http://{admin.read_text()}/listeners?format=json", timeout=1
            ) as said:
                found = json.load(said)["listener_statuses"]
            if len(found) == count:
                return {f["name"]: f["local_address"]["socket_address"]["port_value"] for f in found}
        time.sleep(0.02)
    raise AssertionError("Envoy did not start")
