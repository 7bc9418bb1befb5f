"""The errors a client or an operator can meet.

Each class carries the HTTP status and a stable ``reason``; ``proxy.server`` is the one place that turns
them into a response (``respond_error``), ``cli.main`` the one place that turns them into an exit code.
"""

from __future__ import annotations

from typing import ClassVar


class PointsmanError(Exception):
    """Base of every error that is somebody's mistake or misfortune, not a bug of ours."""

    status: ClassVar[int] = 500
    reason: ClassVar[str] = "internal"
    kind: ClassVar[str] = "server_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class SettingsError(PointsmanError):
    """Settings that cannot be used; the message names the key and the fix. Ends the command with exit code
    2.
    """

    reason = "settings"


class BadRequest(PointsmanError):
    status, reason, kind = 400, "bad_request", "invalid_request_error"


class Forbidden(PointsmanError):
    status, reason, kind = 403, "forbidden", "invalid_request_error"


class ModelNotFound(PointsmanError):
    status, reason, kind = 404, "model_not_found", "invalid_request_error"

    def __init__(self, model: str, served: list[str]) -> None:
        known = f" Models served here: {', '.join(served)}." if served else ""
        super().__init__(f"The model `{model}` does not exist.{known}", param="model")


class PathNotFound(PointsmanError):
    status, reason, kind = 404, "path_not_found", "invalid_request_error"


class MethodNotAllowed(PointsmanError):
    status, reason, kind = 405, "method_not_allowed", "invalid_request_error"


class RequestTimeout(PointsmanError):
    status, reason, kind = 408, "request_timeout", "invalid_request_error"


class Conflict(PointsmanError):
    status, reason, kind = 409, "conflict", "invalid_request_error"


class PreconditionFailed(PointsmanError):
    status, reason, kind = 412, "no_cached_prefix", "invalid_request_error"


class BodyTooLarge(PointsmanError):
    status, reason, kind = 413, "body_too_large", "invalid_request_error"


class Saturated(PointsmanError):
    status, reason, kind = 429, "saturated", "rate_limit_error"


class HeadTooLarge(PointsmanError):
    status, reason, kind = 431, "head_too_large", "invalid_request_error"


class UpstreamFailed(PointsmanError):
    status, reason, kind = 502, "upstream_failed", "server_error"


class NoEndpoints(PointsmanError):
    status, reason, kind = 503, "no_endpoints", "server_error"


class UpstreamTimeout(PointsmanError):
    status, reason, kind = 504, "upstream_timeout", "server_error"
