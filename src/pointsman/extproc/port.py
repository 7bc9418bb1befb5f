"""The picker's gRPC port: what can be asked of there, and in which form."""

from __future__ import annotations

import ssl
from pathlib import Path

from pointsman.config import Picker as PickerSettings
from pointsman.extproc.health import Health
from pointsman.extproc.tls import Certificate, from_directory, self_signed

EXT_PROC = "envoy.service.ext_proc.v3.ExternalProcessor"
PROCESS = f"/{EXT_PROC}/Process"
LIVENESS, READINESS = "liveness", "readiness"
HEALTH_NAMES = ("", LIVENESS, READINESS, EXT_PROC)
"""What can be asked of (llm-d's names)."""


def tell_health(health: Health, *, ready: bool, draining: bool) -> None:
    """``ready``: an endpoint can answer."""
    for name in HEALTH_NAMES:
        serves = name == LIVENESS or not draining
        health.set(name, serves and (name != READINESS or ready))


def tls_of(settings: PickerSettings) -> tuple[ssl.SSLContext | None, Certificate | None]:
    """What the port speaks, and the files it comes from, if it does."""
    if not settings.tls or settings.socket:
        return None, None
    if not settings.tls_directory:
        return self_signed(), None
    certificate = from_directory(Path(settings.tls_directory))
    return certificate.context, certificate
