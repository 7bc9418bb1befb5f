"""Endpoints from a file, ours or llm-d's file-discovery form (facts 10): the ``endpoints`` list of a YAML
mapping.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from pointsman.config import Endpoint, check_endpoint, convert, read_yaml
from pointsman.errors import SettingsError

MAX_FILE_BYTES = 1024 * 1024


class LlmdEndpoint(msgspec.Struct, forbid_unknown_fields=True):
    """An entry of llm-d's file."""

    address: str
    port: str | int
    name: str = ""
    namespace: str = "default"
    labels: Mapping[str, str] = {}

    def ours(self) -> Endpoint:
        host = f"[{self.address}]" if ":" in self.address else self.address
        labels = {"namespace": self.namespace, **self.labels}
        return Endpoint(url=f"http://{host}:{self.port}", name=self.name, labels=labels)


def read(path: str) -> list[Endpoint]:
    """The endpoints in the file. ``SettingsError`` names the entry that cannot be used."""
    file = Path(path)
    try:
        size = file.stat().st_size
    except OSError as exc:
        raise SettingsError(f"discovery.file: {path}: cannot be read: {exc.strerror}") from exc
    if size > MAX_FILE_BYTES:
        raise SettingsError(f"discovery.file: {path}: larger than {MAX_FILE_BYTES} bytes")
    tree = read_yaml(file)
    entries = tree.pop("endpoints", None)
    if not isinstance(entries, list) or tree:
        raise SettingsError(
            f"discovery.file: {path}: a mapping with the one key `endpoints`, a list, is expected"
        )
    endpoints = []
    for i, entry in enumerate(entries):
        where = f"{path}: endpoints[{i}]"
        if isinstance(entry, dict) and "address" in entry:
            endpoints.append(convert(entry, LlmdEndpoint, where).ours())
        else:
            endpoints.append(convert(entry, Endpoint, where))
        check_endpoint(endpoints[-1], where)
    return endpoints


def version(path: str) -> tuple[int, int]:
    """Changes when the file does; (0, 0) while it cannot be looked at."""
    try:
        stat = Path(path).stat()
    except OSError:
        return (0, 0)
    return (stat.st_mtime_ns, stat.st_size)
