"""``pointsman picker``: its flags, what it prints, how it starts and stops."""

from __future__ import annotations

import argparse
import asyncio
import re
import signal
import sys
from pathlib import Path

import pytest

from pointsman.cli.picker import SETTINGS, add_arguments, notices, policy_file, settings_of
from pointsman.config import Settings
from pointsman.errors import SettingsError
from pointsman.testing.upstream import FakeUpstream

URL = "http://127.0.0.1:8000"
FILE_DISCOVERY = """
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- type: queue-scorer
- type: file-discovery
  parameters: {path: PATH}
schedulingProfiles:
- name: default
  plugins:
  - {pluginRef: queue-scorer}
dataLayer:
  discovery: {pluginRef: file-discovery}
"""


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(words)


def told(*words: str) -> Settings:
    args = parsed(*words)
    with policy_file(args):
        return settings_of(args)


def test_ports_and_defaults_are_llm_d_s() -> None:
    settings = told(URL)
    picker = settings.picker
    assert (picker.port, picker.health_port, settings.admin.port) == (9002, 9003, 9090)
    assert (picker.tls, picker.subsets, picker.scores, settings.server.drain_s) == (True, True, False, 30.0)


def test_llm_d_s_flags_are_settings_of_ours() -> None:
    settings = told(
        URL,
        *("--grpc-port", "1", "--grpc-health-port=2", "--metrics-port", "3"),
        *("--secure-serving=false", "--cert-path", "/certs", "--enable-cert-reload"),
        *("--emit-endpoint-scores", "--disable-endpoint-subset-filter=true"),
        *("--drain-timeout", "1m30s", "--refresh-metrics-interval", "50ms"),
        *("--grpc-max-recv-msg-size", "1000"),
    )
    picker = settings.picker
    assert (picker.port, picker.health_port, settings.admin.port) == (1, 2, 3)
    assert (picker.tls, picker.tls_directory, picker.tls_reload) == (False, "/certs", True)
    assert (picker.scores, picker.subsets, picker.message_bytes) == (True, False, 1000)
    assert (settings.server.drain_s, settings.metrics.interval_s) == (90.0, 0.05)
    assert settings.metrics.idle_interval_s == 0.05


def test_idle_endpoints_are_read_seldom_unless_llm_d_s_flag_or_a_setting_says_otherwise() -> None:
    assert told(URL).metrics.idle_interval_s == 5.0
    metrics = told(URL, "--refresh-metrics-interval=50ms", "--set", "metrics.idle_interval_s=2").metrics
    assert (metrics.interval_s, metrics.idle_interval_s) == (0.05, 2.0)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("grpc-port", "x"),
        ("secure-serving", "maybe"),
        ("drain-timeout", "soon"),
        ("drain-timeout", ""),
        ("refresh-metrics-interval", "5"),
    ],
)
def test_a_value_that_a_flag_cannot_have_is_named(flag: str, value: str) -> None:
    assert flag in SETTINGS
    with pytest.raises(SettingsError, match=f"--{flag} {value}: is not "):
        told(URL, f"--{flag}={value}")


def test_flags_without_meaning_here_are_taken_and_said_to_be() -> None:
    args = parsed(URL, "--tracing=false", "-v", "4", "--enable-pprof", "--metrics-staleness-threshold", "2s")
    lines = notices(args)
    assert [line.partition(" ")[0] for line in lines] == [
        "--metrics-staleness-threshold",
        "--tracing",
        "--enable-pprof",
        "--v",
    ]
    assert notices(parsed(URL)) == []


@pytest.mark.parametrize("flag", ["--pool-name=p", "--endpoint-selector=app=vllm"])
def test_what_needs_kubernetes_says_so(flag: str) -> None:
    with pytest.raises(SettingsError, match=r"does not discover endpoints in Kubernetes; name endpoints"):
        told(flag)
    with pytest.raises(SettingsError, match=r"^name endpoints"):
        told()


def test_a_pool_name_beside_endpoints_from_a_file_is_fine(tmp_path: Path) -> None:
    listed = tmp_path / "endpoints.yaml"
    listed.write_text("endpoints: [{name: a, address: 127.0.0.1, port: '8000'}]")
    text = FILE_DISCOVERY.replace("PATH", str(listed))
    (tmp_path / "epp.yaml").write_text(text)
    for words in (("--config-file", str(tmp_path / "epp.yaml")), ("--config-text", text)):
        assert told("--pool-name", "p", *words).scheduling.picker_config.endswith(".yaml")
    with pytest.raises(SettingsError, match="--config-text"):
        told("--config-file", str(tmp_path / "epp.yaml"), "--config-text", text)
    with pytest.raises(SettingsError, match="is no EndpointPickerConfig"):
        told("--config-file", str(listed))


def test_settings_files_and_their_own_options_count(tmp_path: Path) -> None:
    file = tmp_path / "pointsman.yaml"
    file.write_text(f"endpoints: [{{url: '{URL}'}}]\nadmin: {{port: 7}}\npicker: {{responses: seen}}")
    settings = told(
        "--config", str(file), "--port", "5", "--host", "127.0.0.1", "--set", "picker.scores=true"
    )
    assert (settings.admin.port, settings.picker.responses, settings.picker.scores) == (7, "seen", True)
    assert (settings.picker.port, settings.picker.host) == (5, "127.0.0.1")
    assert told(URL, "--set", "admin.port=8").admin.port == 8


async def test_it_says_where_it_listens_and_stops_when_asked_to() -> None:
    async with FakeUpstream() as upstream:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "pointsman", "picker", upstream.url, "--tracing=false"),
            *("--host", "127.0.0.1", "--grpc-port", "0", "--grpc-health-port", "0", "--metrics-port", "0"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        assert process.stdout
        said = b""
        while b"admin:" not in said:
            line = await asyncio.wait_for(process.stdout.readline(), 30)
            assert line, said
            said += line
        process.send_signal(signal.SIGTERM)
        out, err = await process.communicate()
    text = said.decode()
    assert f"{upstream.name}  models: m" in text
    assert re.search(r"ext_proc: 127\.0\.0\.1:\d+ \(TLS, self-signed\); responses: auto", text)
    assert re.search(r"health: 127\.0\.0\.1:\d+", text)
    assert process.returncode == 0
    assert out == b""
    assert b"--tracing has no effect" in err
    assert b"draining" in err
