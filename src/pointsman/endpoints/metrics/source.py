"""Where an endpoint's metrics page is, and whose page it is."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence

import msgspec

from pointsman.config import Endpoint as EndpointSettings
from pointsman.config import Url, split_url
from pointsman.endpoints.metrics.mapping import EngineMetrics, recognise
from pointsman.endpoints.target import Target
from pointsman.types import Endpoint


def engines() -> list[EngineMetrics]:
    """Every mapping in this folder."""
    package = importlib.import_module("pointsman.endpoints.metrics")
    names = [module.name for module in pkgutil.iter_modules(package.__path__)]
    modules = [importlib.import_module(f"{package.__name__}.{name}") for name in names]
    return [
        found for module in modules for found in vars(module).values() if isinstance(found, EngineMetrics)
    ]


class PageSource(msgspec.Struct, frozen=True, kw_only=True):
    """How metrics pages are read, where an endpoint's own ``metrics_url`` does not say otherwise."""

    engines: Sequence[EngineMetrics]
    """Tried in this order on a page."""
    engine_labels: Sequence[str] = ()
    """Labels by which an endpoint may say its engine; the first it carries counts."""
    path: str = "/metrics"
    tls: bool = False
    """Over TLS also from endpoints that take their requests without."""
    verify: bool = True
    tls_ca: str = ""

    def url(self, target: Target) -> Url:
        """The page of ``target``; its path is the URL's prefix."""
        own = target.settings.metrics_url
        if own:
            return split_url(own, "endpoints.metrics_url")
        url = target.url
        return msgspec.structs.replace(url, tls=url.tls or self.tls, prefix=url.prefix + self.path)

    def access(self, target: Target) -> EndpointSettings:
        """The endpoint's settings as they count for its page.

        Certificates go unchecked only where no credentials are sent.
        """
        own = target.settings
        secret = own.api_key or own.api_key_env or own.headers
        return msgspec.structs.replace(
            own,
            tls_ca=own.tls_ca or self.tls_ca,
            tls_verify=own.tls_verify and (self.verify or bool(secret)),
        )

    def engine(self, endpoint: Endpoint, page: bytes) -> EngineMetrics | None:
        """The engine that the endpoint's label names, else the one that the page shows."""
        said = next((endpoint.labels[key] for key in self.engine_labels if key in endpoint.labels), "")
        labelled = next((e for e in self.engines if e.engine == said), None)
        return labelled or recognise(page, self.engines)
