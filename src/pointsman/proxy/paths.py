"""Which paths of an engine the data port passes on. Administration of engines is not for clients."""

from __future__ import annotations

from collections.abc import Sequence

PASSED = (
    "/v1/",
    "/v2/",
    "/inference/v1/",
    "/api/",
    "/generate",
    "/completions",
    "/completion",
    "/chat/completions",
    "/embeddings",
    "/embedding",
    "/infill",
    "/rerank",
    "/reranking",
    "/score",
    "/classify",
    "/pooling",
    "/tokenize",
    "/detokenize",
    "/encode",
    "/apply-template",
    "/invocations",
    "/generative_scoring",
    "/version",
    "/get_model_info",
    "/model_info",
)
"""Inference: these, and below those that end in a slash anything."""

ADMINISTRATION = (
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/v1/systemone",
    "/inference/v1/abort_requests",
    "/v2/repository/",
    "/v2/logging",
    "/v2/trace",
    "/v2/cudasharedmemory/",
    "/v2/systemsharedmemory/",
)
"""Inside what is passed, and yet not for clients."""


class PathPolicy:
    """Everything that is not known to be inference is refused, unless the settings allow it."""

    def __init__(self, allowed: Sequence[str]) -> None:
        self._allowed = frozenset(path for path in allowed if not path.endswith("*"))
        self._allowed_prefixes = tuple(path[:-1] for path in allowed if path.endswith("*"))
        self._known: dict[str, bool] = {}

    def passes(self, path: str) -> bool:
        """Whether a request for ``path`` (without query) goes to an endpoint."""
        known = self._known.get(path)
        if known is None:
            known = self._decide(path)
            if len(self._known) < 4096:
                self._known[path] = known
        return known

    def _decide(self, path: str) -> bool:
        if path in self._allowed or (self._allowed_prefixes and path.startswith(self._allowed_prefixes)):
            return True
        # An encoded or doubled slash may mean another path to the engine than to us.
        if "%" in path or "//" in path or "/." in path or "\\" in path:
            return False
        if _matches(path, ADMINISTRATION):
            return False
        return _matches(path, PASSED)


def _matches(path: str, table: Sequence[str]) -> bool:
    return any(path.startswith(e) if e.endswith("/") else path.rstrip("/") == e for e in table)
