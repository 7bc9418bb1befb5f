"""Session affinity: where a session's next request goes, and what the client must carry for it."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from pointsman.errors import SettingsError
from pointsman.registry import build
from pointsman.scheduling.cycle import Services
from pointsman.scheduling.sessions import MAX_SESSIONS, Bindings
from pointsman.testing import cycle, fleet, services
from pointsman.types import Decision

FILTER = "session-affinity-filter"
SCORER = "session-affinity-scorer"
BY_ID = {"strategy": "session_id"}


class Router:
    """A plugin, a pool of three and a clock; requests that say where they may go and went."""

    def __init__(self, name: str, parameters: dict[str, Any], given: Services | None = None) -> None:
        self.now = 100.0
        self.pool = fleet(3)
        self.services = given or services(clock=lambda: self.now)
        self.plugin: Any = build(name, parameters, "test")
        self.plugin.prepare(self.services)

    def ask(self, **headers: str) -> Any:
        return cycle(
            self.pool, given=self.services, headers={k.replace("_", "-"): v for k, v in headers.items()}
        )

    def kept(self, **headers: str) -> list[str]:
        return [e.name for e in self.plugin.filter(self.ask(**headers))]

    def send(self, to: int, profile: str = "default", **headers: str) -> tuple[tuple[str, str], ...]:
        """Dispatch to endpoint ``to``; the response headers the client gets."""
        asked = self.ask(**headers)
        decision = Decision(
            request_id="r",
            model="m",
            at_s=0,
            profile=profile,
            candidates=asked.candidates,
            chosen=self.pool[to],
        )
        self.plugin.on_dispatch(asked, decision)
        return decision.response_headers


ALL = ["e0", "e1", "e2"]


def test_the_token_is_llm_ds_and_leads_back() -> None:
    router = Router(FILTER, {})
    ((name, token),) = router.send(1)
    assert name == "x-session-token"
    assert base64.b64decode(token).decode() == "default/e1"
    assert router.kept(x_session_token=token) == ["e1"]
    assert router.kept() == ALL


def test_a_name_with_a_namespace_is_taken_as_it_is() -> None:
    router = Router(FILTER, {})
    router.pool = fleet(name=["prod/vllm-0", "prod/vllm-1"])
    ((_, token),) = router.send(1)
    assert base64.b64decode(token).decode() == "prod/vllm-1"
    assert router.kept(x_session_token=token) == ["prod/vllm-1"]


@pytest.mark.parametrize("token", ["", "%%%", "ZGVmYXVsdC9nb25l", "/////w=="])
def test_a_token_that_leads_nowhere_pins_nothing(token: str) -> None:
    assert Router(FILTER, {}).kept(x_session_token=token) == ALL


def test_the_tokens_header_can_be_named() -> None:
    router = Router(FILTER, {"encodedEndpointHeaderConfig": {"header": "X-Sticky"}})
    ((name, token),) = router.send(2)
    assert name == "x-sticky"
    assert router.kept(x_sticky=token) == ["e2"]


def test_two_plugins_set_the_header_once() -> None:
    router = Router(FILTER, {})
    asked = router.ask()
    decision = Decision(
        request_id="r", model="m", at_s=0, profile="default", candidates=router.pool, chosen=router.pool[0]
    )
    for name in (FILTER, SCORER):
        plugin: Any = build(name, {}, "test")
        plugin.on_dispatch(asked, decision)
    assert len(decision.response_headers) == 1


def test_the_scorer_prefers_the_bound_endpoint() -> None:
    router = Router(SCORER, {})
    ((_, token),) = router.send(2)
    assert router.plugin.score(router.ask(x_session_token=token)) == [0.0, 0.0, 1.0]
    assert router.plugin.score(router.ask()) == [0.0, 0.0, 0.0]


def test_a_session_stays_where_its_last_request_went() -> None:
    router = Router(FILTER, BY_ID)
    assert router.kept(x_session_id="s") == ALL
    assert router.send(1, x_session_id="s") == ()
    assert router.kept(x_session_id="s") == ["e1"]
    assert router.kept(x_session_id="other") == ALL
    router.send(0, x_session_id="s")
    assert router.kept(x_session_id="s") == ["e0"]


def test_a_session_whose_endpoint_is_gone_may_go_anywhere_and_is_bound_anew() -> None:
    router = Router(FILTER, BY_ID)
    router.send(1, x_session_id="s")
    router.pool = [router.pool[0], router.pool[2]]
    assert router.kept(x_session_id="s") == ["e0", "e2"]
    router.send(1, x_session_id="s")
    assert router.kept(x_session_id="s") == ["e2"]


def test_a_binding_lasts_from_its_last_use() -> None:
    router = Router(FILTER, BY_ID)
    router.send(1, x_session_id="s")
    router.now += 299
    router.send(1, x_session_id="s")
    router.now += 299
    assert router.kept(x_session_id="s") == ["e1"]
    router.now += 2
    assert router.kept(x_session_id="s") == ALL


def test_sources_are_tried_in_order() -> None:
    sources = [{"header": "X-A"}, {"cookie": "sid"}]
    router = Router(FILTER, BY_ID | {"sessionIdConfig": {"sources": sources}})
    router.send(1, cookie="theme=dark; sid=7")
    assert router.kept(cookie="sid=7; theme=light") == ["e1"]
    router.send(2, x_a="7", cookie="sid=8")
    assert router.kept(x_a="7") == ["e2"]
    assert router.kept(cookie="sid=8") == ALL


def test_an_attribute_comes_from_session_id_producer() -> None:
    given = services()
    producer: Any = build("session-id-producer", {"cookieName": "sid"}, "test")
    producer.prepare(given)
    router = Router(FILTER, BY_ID | {"sessionIdConfig": {"sources": [{"attribute": "SessionID"}]}}, given)
    router.send(1, cookie="sid=7")
    assert router.kept(cookie="sid=7") == ["e1"]
    assert router.kept(x_session_id="7") == ALL


def test_the_session_id_attribute_is_there_without_a_producer() -> None:
    router = Router(FILTER, BY_ID | {"sessionIdConfig": {"sources": [{"attribute": "SessionID"}]}})
    router.send(1, x_session_id="7")
    assert router.kept(x_session_id="7") == ["e1"]


def test_an_attribute_that_nobody_publishes_stops_start_up() -> None:
    with pytest.raises(SettingsError, match="agent-identity"):
        Router(FILTER, BY_ID | {"sessionIdConfig": {"sources": [{"attribute": "agent-identity"}]}})


def test_an_instance_for_one_profile_ignores_the_others() -> None:
    router = Router(FILTER, {"profileName": "prefill"})
    assert router.send(1, profile="decode") == ()
    assert len(router.send(1, profile="prefill")) == 1


def test_bindings_are_bounded_in_number_and_time() -> None:
    bindings = Bindings(ttl_s=300, sweep_s=10)
    for i in range(MAX_SESSIONS + 1000):
        bindings.bind(f"s{i}", "e0", 0.0)
    assert len(bindings) == MAX_SESSIONS
    assert bindings.get("s0", 0.0) == ""
    assert bindings.get(f"s{MAX_SESSIONS + 999}", 0.0) == "e0"
    bindings.bind("late", "e1", 301.0)
    assert len(bindings) == 1


@pytest.mark.parametrize(
    "parameters",
    [
        {"strategy": "cookie"},
        {"sessionIdConfig": {"sources": [{"header": "a", "cookie": "b"}]}},
        {"sessionIdConfig": {"sources": [{}]}},
        {"sessionIdConfig": {"evictionTtlSeconds": 0}},
        {"header": "x"},
    ],
)
def test_refuses(parameters: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="session-affinity-filter"):
        build(FILTER, parameters, "test")


def test_the_unused_half_of_the_parameters_is_not_ignored_in_silence(
    caplog: pytest.LogCaptureFixture,
) -> None:
    build(FILTER, {"sessionIdConfig": {}}, "test")
    assert "sessionIdConfig has no effect" in caplog.text
