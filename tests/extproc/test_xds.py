"""The endpoint lists that Envoy follows: versions, nonces, what it acknowledges and what it refuses."""

from __future__ import annotations

import logging
from typing import cast

import pytest

pytest.importorskip("envoy.service.discovery.v3.discovery_pb2")

from envoy.config.endpoint.v3.endpoint_pb2 import ClusterLoadAssignment
from envoy.service.discovery.v3.discovery_pb2 import DiscoveryRequest, DiscoveryResponse

from pointsman.config import Breaker, Endpoint
from pointsman.endpoints.pool import Pool
from pointsman.endpoints.target import targets_of
from pointsman.extproc.destinations import Destinations
from pointsman.extproc.grpc import Call
from pointsman.extproc.xds import ADS, EDS, TYPE, EndpointLists

HEALTHY, UNHEALTHY, DRAINING = 1, 2, 3


class FakeStream:
    """What was sent, taken apart."""

    def __init__(self) -> None:
        self.sent: list[DiscoveryResponse] = []
        self.finished: int | None = None
        self.paused = False

    def send(self, message: bytes) -> None:
        self.sent.append(DiscoveryResponse.FromString(message))

    def finish(self, status: int = 0, message: str = "") -> None:
        self.finished = status

    def lists(self, n: int = -1) -> dict[str, dict[str, int]]:
        """Of the n-th answer: by cluster, each address and its health."""
        found = {}
        for resource in self.sent[n].resources:
            tree = ClusterLoadAssignment()
            assert resource.Unpack(tree)
            each = [e for group in tree.endpoints for e in group.lb_endpoints]
            sockets = [e.endpoint.address.socket_address for e in each]
            found[tree.cluster_name] = {
                f"{s.address}:{s.port_value}": int(e.health_status)
                for s, e in zip(sockets, each, strict=True)
            }
        return found


class Rig:
    """A pool of three, its lists, and a stream."""

    def __init__(self, *urls: str) -> None:
        self.now = 100.0
        self.pool = Pool(lambda: self.now, Breaker(faults=1))
        for url in urls or ("http://10.0.0.1:80", "http://10.0.0.2:80", "http://[fd00::3]:80"):
            self.add(Endpoint(url=url))
        self.lists = EndpointLists(self.pool, Destinations(self.pool))

    def add(self, settings: Endpoint) -> None:
        (target,) = targets_of(settings)
        self.pool.add(target, "test")

    def follow(self, *clusters: str, path: str = EDS) -> tuple[FakeStream, Call]:
        stream = FakeStream()
        call = self.lists.services[path](stream, {})
        if clusters:
            call.message(ask(*clusters))
        return stream, call


def ask(*clusters: str, nonce: str = "", version: str = "", kind: str = TYPE, error: str = "") -> bytes:
    request = DiscoveryRequest(
        resource_names=clusters, response_nonce=nonce, version_info=version, type_url=kind
    )
    if error:
        request.error_detail.code = 3
        request.error_detail.message = error
    return cast(bytes, request.SerializeToString())


@pytest.mark.parametrize("path", [EDS, ADS])
def test_who_asks_gets_the_list_at_once_and_again_when_it_changes(path: str) -> None:
    rig = Rig()
    stream, call = rig.follow("endpoints", path=path)
    everyone = dict.fromkeys(("10.0.0.1:80", "10.0.0.2:80", "fd00::3:80"), HEALTHY)
    assert stream.lists() == {"endpoints": everyone}
    first = stream.sent[0]
    assert first.type_url == TYPE
    call.message(ask("endpoints", nonce=first.nonce, version=first.version_info))
    assert len(stream.sent) == 1  # an acknowledgement wants no answer
    rig.add(Endpoint(url="http://10.0.0.4:80"))
    assert stream.lists()["endpoints"] == {**everyone, "10.0.0.4:80": HEALTHY}
    rig.pool.remove("10.0.0.1:80")
    assert "10.0.0.1:80" not in stream.lists()["endpoints"]
    assert len({each.version_info for each in stream.sent}) == len({each.nonce for each in stream.sent}) == 3


def test_drains_and_breakers_show_as_health_when_looked_at() -> None:
    rig = Rig()
    stream, _ = rig.follow("endpoints")
    rig.pool.drain("10.0.0.1:80")
    rig.pool.failed(rig.pool.members["10.0.0.2:80"].endpoint)
    rig.lists.renew()
    found = stream.lists()["endpoints"]
    assert (found["10.0.0.1:80"], found["10.0.0.2:80"]) == (DRAINING, UNHEALTHY)
    rig.lists.renew()
    assert len(stream.sent) == 2  # nothing has changed since
    rig.pool.drain("10.0.0.1:80", False)
    rig.now += 60.0
    rig.pool.candidates("")
    rig.lists.renew()
    assert set(stream.lists()["endpoints"].values()) == {HEALTHY}


def test_a_refused_list_is_logged_and_not_sent_again(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig()
    stream, call = rig.follow("endpoints")
    with caplog.at_level(logging.ERROR):
        call.message(ask("endpoints", nonce="1", error="malformed IP address"))
    assert "malformed IP address" in caplog.text
    assert len(stream.sent) == 1
    assert stream.finished is None
    rig.pool.remove("10.0.0.1:80")
    assert len(stream.sent) == 2


def test_an_answer_to_an_overtaken_list_changes_nothing() -> None:
    rig = Rig()
    stream, call = rig.follow("endpoints")
    rig.pool.remove("10.0.0.1:80")
    call.message(ask("others", nonce="1"))
    assert len(stream.sent) == 2
    call.message(ask("endpoints", "others", nonce="2"))
    assert set(stream.lists()) == {"endpoints", "others"}


def test_other_kinds_are_left_unanswered_and_nonsense_ends_the_stream() -> None:
    rig = Rig()
    stream, call = rig.follow(path=ADS)
    call.message(ask("x", kind="type.googleapis.com/envoy.config.cluster.v3.Cluster"))
    assert (stream.sent, stream.finished) == ([], None)
    call.message(b"\xff\xff")
    assert stream.finished == 3
    greedy, call = rig.follow()
    call.message(ask(*(f"cluster-{n}" for n in range(100))))
    assert (greedy.sent, greedy.finished) == ([], 3)


def test_who_has_left_or_does_not_read_gets_nothing_more() -> None:
    rig = Rig()
    (gone, call), (slow, slow_call), (half, half_call) = (rig.follow("endpoints") for _ in range(3))
    call.cancelled()
    half_call.half_closed()
    assert half.finished == 0
    slow.paused = True
    rig.pool.remove("10.0.0.1:80")
    rig.pool.remove("10.0.0.2:80")
    assert [len(s.sent) for s in (gone, slow, half)] == [1, 1, 1]
    slow.paused = False
    slow_call.resumed()
    assert len(slow.sent) == 2  # the last list, not each that was missed
    assert set(slow.lists()["endpoints"]) == {"fd00::3:80"}
    slow_call.resumed()
    assert len(slow.sent) == 2


async def test_a_host_name_becomes_an_address_and_an_unknown_one_is_left_out() -> None:
    pool = Pool(lambda: 0.0)
    for url in ("http://localhost:8000", "http://no-such-host.invalid:8000"):
        (target,) = targets_of(Endpoint(url=url))
        pool.add(target, "test")
    destinations = Destinations(pool)
    lists = EndpointLists(pool, destinations)
    assert destinations.of("localhost:8000") == ""
    await destinations.resolve()
    lists.renew()
    assert destinations.of("localhost:8000") == "127.0.0.1:8000"
    assert destinations.of("no-such-host.invalid:8000") == destinations.of("nobody") == ""
    (endpoint,) = lists.assignment("endpoints").endpoints[0].lb_endpoints
    assert endpoint.endpoint.hostname == "localhost"


def test_weights_credentials_and_tls_are_told() -> None:
    rig = Rig("http://10.0.0.1:80")
    rig.add(Endpoint(url="https://10.0.0.9:443", weight=0.001, api_key="k", tls_verify=False))
    plain, secure = rig.lists.assignment("endpoints").endpoints[0].lb_endpoints
    assert (plain.load_balancing_weight.value, secure.load_balancing_weight.value) == (100, 1)
    metadata = secure.metadata.filter_metadata
    assert metadata["pointsman.headers"]["authorization"] == "Bearer k"
    assert metadata["envoy.transport_socket_match"]["tls"] == "unverified"
    assert not plain.HasField("metadata")


def test_a_drain_ends_every_stream() -> None:
    rig = Rig()
    streams = [rig.follow("endpoints")[0] for _ in range(3)]
    rig.lists.drain()
    assert [s.finished for s in streams] == [0, 0, 0]
    rig.pool.remove("10.0.0.1:80")
    assert all(len(s.sent) == 1 for s in streams)
