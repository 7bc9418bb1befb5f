"""Envoy's routes: what of an engine's paths goes on, as on the port of `pointsman serve`, and how long and
how often it is tried.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pointsman.config import Settings, Upstream
from pointsman.extproc.envoy_clusters import ENDPOINTS, Tree, any_
from pointsman.proxy.head import STEERING
from pointsman.proxy.paths import ADMINISTRATION, PASSED

DECIDING = ("envoy.filters.http.buffer", "envoy.filters.http.ext_proc", "envoy.filters.http.ext_authz")
"""Filters that what is refused need not pass."""
ODD_PATH = ".*(%|//).*"
"""An encoded or doubled slash may mean another path to the engine than to Envoy."""
READ = tuple(
    sorted(
        name.decode()
        for name in STEERING
        if name.endswith((b"-id", b"-objective", b"-rewrite", b"-ms", b"-fps", b"-seconds", b"-resolution"))
    )
)
"""What clients tell the picker (llm-d's control headers): no business of an engine."""
NOT_FOUND = (
    '{"error": {"message": "This path is not served here.", "type": "invalid_request_error", '
    '"param": null, "code": "path_not_found"}}'
)


def routes(settings: Settings) -> Tree:
    """Inference goes on; administration of engines, and what nobody knows, is 404."""
    allowed = settings.server.allow_paths
    return {
        "name": "all",
        "virtual_hosts": [
            {
                "name": "all",
                "domains": ["*"],
                "request_headers_to_remove": list(READ),
                # Retries keep the body; where they may not, Envoy answers 507.
                "request_body_buffer_limit": settings.server.body_bytes,
                "routes": [
                    *(_passed(settings, match) for match in _allowed(allowed)),
                    _refused({"safe_regex": {"regex": ODD_PATH}}),
                    *(_refused(match) for match in _listed(ADMINISTRATION)),
                    *(_passed(settings, match) for match in _listed(PASSED)),
                    _refused({"prefix": "/"}),
                ],
            }
        ],
    }


def _allowed(paths: Sequence[str]) -> Iterator[Tree]:
    for path in paths:
        yield {"prefix": path[:-1]} if path.endswith("*") else {"path": path}


def _listed(paths: Sequence[str]) -> Iterator[Tree]:
    for path in paths:
        if path.endswith("/"):
            yield {"prefix": path}
        else:
            yield {"path": path}
            yield {"path": path + "/"}


def _passed(settings: Settings, match: Tree) -> Tree:
    upstream = settings.upstream
    return {
        "match": match,
        "route": {
            "cluster": ENDPOINTS,
            "timeout": "0s",  # an answer may stream for as long as it comes
            "idle_timeout": f"{max(upstream.first_byte_timeout_s, upstream.between_bytes_timeout_s):.3f}s",
            "auto_host_rewrite": True,
            "retry_policy": _retries(upstream),
        },
    }


def _refused(match: Tree) -> Tree:
    disabled = {"@type": "type.googleapis.com/envoy.config.route.v3.FilterConfig", "disabled": True}
    return {
        "match": match,
        "direct_response": {"status": 404, "body": {"inline_string": NOT_FOUND}},
        "response_headers_to_add": [{"header": {"key": "content-type", "value": "application/json"}}],
        "typed_per_filter_config": {name: {**disabled, "is_optional": True} for name in DECIDING},
    }


def _retries(upstream: Upstream) -> Tree:
    """Another endpoint: the picker's next choice if it gave several, else the least loaded one."""
    when = ["connect-failure", "refused-stream", "reset-before-request"]
    if upstream.retry_statuses:
        when.append("retriable-status-codes")
    other = any_("retry.host.previous_hosts.v3.PreviousHostsPredicate")
    return {
        "retry_on": ",".join(when),
        "num_retries": upstream.tries - 1,
        "retriable_status_codes": list(upstream.retry_statuses),
        "retry_host_predicate": [
            {"name": "envoy.retry_host_predicates.previous_hosts", "typed_config": other}
        ],
        "host_selection_retry_max_attempts": 5,
    }
