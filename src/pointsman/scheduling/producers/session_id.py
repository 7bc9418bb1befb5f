"""session-id-producer."""

from __future__ import annotations

from pointsman.registry import Plugin, register
from pointsman.scheduling.cycle import Services
from pointsman.scheduling.sessions import SESSION_ID, cookie
from pointsman.types import InferenceRequest


@register("session-id-producer")
class SessionId(Plugin):
    """Publish the request attribute ``SessionID``, read from the header or the cookie of the given name."""

    header_name: str = ""
    cookie_name: str = ""

    def __post_init__(self) -> None:
        if bool(self.header_name) == bool(self.cookie_name):
            raise ValueError("headerName, cookieName: give exactly one")

    def prepare(self, services: Services) -> None:
        services.attributes[SESSION_ID] = self.read

    def read(self, request: InferenceRequest) -> str:
        if self.cookie_name:
            return cookie(request, self.cookie_name)
        return request.headers.get(self.header_name.lower(), "")
