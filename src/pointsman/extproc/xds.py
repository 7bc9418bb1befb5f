"""The pool as Envoy's endpoint discovery service (EDS): the whole list, again whenever it changes.

State of the world, version 3, over a stream of its own or among others (ADS). Envoy keeps the last list while
the picker is away, which is what lets it go on without one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping

from envoy.config.core.v3.health_check_pb2 import HealthStatus
from envoy.config.endpoint.v3.endpoint_components_pb2 import LbEndpoint
from envoy.config.endpoint.v3.endpoint_pb2 import ClusterLoadAssignment
from envoy.service.discovery.v3.discovery_pb2 import DiscoveryRequest, DiscoveryResponse
from google.protobuf.message import DecodeError

from pointsman.endpoints.target import request_headers
from pointsman.extproc.destinations import Destinations
from pointsman.extproc.envoy_clusters import HEADERS, TLS_KEY, TLS_MATCH, tls_name
from pointsman.extproc.grpc import Call, Service, Stream
from pointsman.proxy.plane import Endpoints, Seat
from pointsman.types import Endpoint

log = logging.getLogger(__name__)

EDS = "/envoy.service.endpoint.v3.EndpointDiscoveryService/StreamEndpoints"
ADS = "/envoy.service.discovery.v3.AggregatedDiscoveryService/StreamAggregatedResources"
TYPE = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"

CHECK_S = 0.1
"""How often breakers and drains are looked at; the pool tells of joining and leaving by itself."""
MAX_CLUSTERS = 64
"""That one stream may ask for; each gets the same list."""
INVALID_ARGUMENT = 3


class EndpointLists:
    """The list, its version, and the streams that follow it."""

    def __init__(self, pool: Endpoints, destinations: Destinations) -> None:
        self._pool = pool
        self._destinations = destinations
        self._streams: set[_Following] = set()
        self._endpoints: list[bytes] = []
        self._born = int(time.time())
        self._changes = 0
        self.renew()
        pool.listen(self._on_pool)

    @property
    def services(self) -> Mapping[str, Service]:
        """By path, for a ``GrpcServer``."""
        return {EDS: self._follow, ADS: self._follow}

    @property
    def version(self) -> str:
        """Different for each list, also after a restart."""
        return f"{self._born}.{self._changes}"

    def _follow(self, stream: Stream, headers: Mapping[str, str]) -> Call:
        return _Following(self, self._streams, stream)

    def _on_pool(self, event: str, endpoint: Endpoint) -> None:
        if event in ("joined", "left"):
            self.renew()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(CHECK_S)
            self.renew()

    def drain(self) -> None:
        """End the streams, which would never end by themselves: Envoy asks again where it finds us."""
        for stream in list(self._streams):
            stream.half_closed()

    def renew(self) -> None:
        """Tell everybody when the list is not what it was."""
        found = {self._destinations.at(m.target): m for m in self._pool.members.values()}
        now = [
            _endpoint(where, m).SerializeToString(deterministic=True) for where, m in found.items() if where
        ]
        if now == self._endpoints:
            return
        self._endpoints = now
        self._changes += 1
        for stream in list(self._streams):
            stream.push()

    def assignment(self, cluster: str) -> ClusterLoadAssignment:
        """The list under the name of a cluster."""
        tree = ClusterLoadAssignment(cluster_name=cluster)
        endpoints = tree.endpoints.add().lb_endpoints
        for data in self._endpoints:
            endpoints.add().MergeFromString(data)
        return tree


def _endpoint(where: str, member: Seat) -> LbEndpoint:
    target = member.target
    host, _, port = where.rpartition(":")
    tree = LbEndpoint()
    tree.endpoint.address.socket_address.address = host.strip("[]")
    tree.endpoint.address.socket_address.port_value = int(port)
    tree.endpoint.hostname = target.url.host
    tree.load_balancing_weight.value = max(1, min(100_000, round(100 * target.settings.weight)))
    if member.draining:
        tree.health_status = HealthStatus.DRAINING
    elif not member.usable:
        tree.health_status = HealthStatus.UNHEALTHY
    else:
        tree.health_status = HealthStatus.HEALTHY
    for name, value in request_headers(target.settings).items():
        tree.metadata.filter_metadata[HEADERS][name.decode("latin-1")] = value.decode("latin-1")
    if target.url.tls:
        tree.metadata.filter_metadata[TLS_MATCH][TLS_KEY] = tls_name(target.settings)
    return tree


class _Following:
    """One stream: asked for clusters, it gets their list, and each later one once (``grpc.Call``)."""

    def __init__(self, lists: EndpointLists, streams: set[_Following], stream: Stream) -> None:
        self._lists = lists
        self._streams = streams
        self._stream = stream
        self._clusters: tuple[str, ...] = ()
        self._sent = 0
        self._version = ""
        streams.add(self)

    def message(self, data: bytes) -> None:
        request = DiscoveryRequest()
        try:
            request.ParseFromString(data)
        except DecodeError:
            self._end(INVALID_ARGUMENT, "not a DiscoveryRequest")
            return
        if request.type_url not in ("", TYPE):
            return  # over ADS Envoy may ask for kinds that we do not have
        if request.response_nonce and request.response_nonce != str(self._sent):
            return  # an answer to a list that has been overtaken
        if request.HasField("error_detail"):
            log.error("Envoy refuses the endpoints it was sent: %s", request.error_detail.message)
        clusters = tuple(sorted(set(request.resource_names)))
        if len(clusters) > MAX_CLUSTERS:
            self._end(INVALID_ARGUMENT, f"more than {MAX_CLUSTERS} clusters")
            return
        if clusters != self._clusters:
            self._clusters = clusters
            self._send()

    def push(self) -> None:
        """The list has changed."""
        if self._clusters and not self._stream.paused:
            self._send()

    def _send(self) -> None:
        if not self._clusters:
            return
        self._sent += 1
        self._version = self._lists.version
        answer = DiscoveryResponse(version_info=self._version, type_url=TYPE, nonce=str(self._sent))
        for cluster in self._clusters:
            answer.resources.add().Pack(self._lists.assignment(cluster))
        self._stream.send(answer.SerializeToString())

    def _end(self, status: int, message: str) -> None:
        self._streams.discard(self)
        self._stream.finish(status, message)

    def half_closed(self) -> None:
        self._end(0, "")

    def cancelled(self) -> None:
        self._streams.discard(self)

    def resumed(self) -> None:
        if self._version != self._lists.version:
            self._send()
