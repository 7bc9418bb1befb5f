"""How to reach an endpoint: what the data plane, the scraper and the model lookup share."""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from functools import lru_cache

import msgspec

from pointsman.config import Endpoint as EndpointSettings
from pointsman.config import Url, check_endpoint
from pointsman.errors import SettingsError
from pointsman.types import ROLE_LABEL


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """One address of one model server. Equal targets need no new connection pool."""

    name: str
    settings: EndpointSettings
    url: Url
    connect_host: str
    """The address to connect to; differs from the URL's host when that name has several addresses."""

    @property
    def labels(self) -> Mapping[str, str]:
        role = self.settings.role
        return {**self.settings.labels, ROLE_LABEL: role} if role else self.settings.labels


def targets_of(settings: EndpointSettings, addresses: tuple[str, ...] = ()) -> list[Target]:
    """The targets of one endpoint setting: one for each of ``addresses``, or the host itself without any.

    ``SettingsError`` when the endpoint could not be talked to.
    """
    url = check_endpoint(settings, "endpoints")
    if settings.tls_ca:
        ssl_context(settings)
    name = settings.name or url.authority + url.prefix
    if not addresses:
        return [Target(name=name, settings=settings, url=url, connect_host=url.host)]
    return [
        Target(name=f"{name}@{address}", settings=settings, url=url, connect_host=address)
        for address in addresses
    ]


def request_headers(settings: EndpointSettings) -> dict[bytes, bytes]:
    """Headers added to every request to the endpoint, names lower-cased: credentials and the configured
    ones.
    """
    headers = {k.lower().encode("latin-1"): v.encode("latin-1") for k, v in settings.headers.items()}
    key = settings.api_key or (os.environ.get(settings.api_key_env, "") if settings.api_key_env else "")
    if key:
        headers[b"authorization"] = b"Bearer " + key.encode("latin-1")
    return headers


def ssl_context(settings: EndpointSettings) -> ssl.SSLContext:
    """TLS settings for connections to the endpoint. HTTP/1.1 only."""
    try:
        return _context(settings.tls_ca, settings.tls_verify)
    except (OSError, ssl.SSLError) as exc:
        raise SettingsError(f"endpoints: {settings.url}: tls_ca {settings.tls_ca}: {exc}") from exc


@lru_cache(maxsize=64)  # reading the system's certificates takes some 20 ms
def _context(ca: str, verify: bool) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=ca or None)
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["http/1.1"])
    return context
