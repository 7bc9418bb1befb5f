"""``pointsman config``, and settings files told from picker configurations."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import yaml

from pointsman.cli.main import main
from pointsman.cli.settings import add_settings_arguments, settings_from
from pointsman.config import Settings
from pointsman.errors import SettingsError

PICKER = """
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- type: queue-scorer
"""


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(["config", *arguments])
    code = exit_.value.code
    assert isinstance(code, int)
    return code


def parsed(*arguments: str) -> Settings:
    parser = argparse.ArgumentParser()
    add_settings_arguments(parser)
    return settings_from(parser.parse_args(arguments))


@pytest.fixture
def picker(tmp_path: Path) -> str:
    path = tmp_path / "epp.yaml"
    path.write_text(PICKER)
    return str(path)


@pytest.fixture
def settings(tmp_path: Path) -> str:
    path = tmp_path / "pointsman.yaml"
    path.write_text("endpoints: [{url: http://a:1, api_key: hunter2}]\nserver: {port: 9000}\n")
    return str(path)


class TestCheck:
    def test_good_settings(self, settings: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert run("check", "--config", settings, "http://b:2") == 0
        assert capsys.readouterr().out == "ok: 2 endpoints, policy least-cost\n"

    def test_endpoints_of_a_file_count(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "endpoints.yaml"
        path.write_text("endpoints: [{address: a, port: 1}]")
        assert run("check", "--set", f"discovery.file={path}") == 0
        assert capsys.readouterr().out == "ok: 1 endpoint, policy least-cost\n"

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (("--set", "scheduling.preset=nope"), "unknown preset 'nope'"),
            (("--set", "discovery.file=/no/such.yaml"), "/no/such.yaml: cannot be read"),
            (("--set", "scheduling.picker_config=/no/such.yaml"), "/no/such.yaml: cannot be read"),
            (("--set", "server.tls_cert=/no/c.pem", "--set", "server.tls_key=/no/k.pem"), "server.tls_cert"),
            (("--set", "endpoints=[{url: https://a, tls_ca: /no/ca.pem}]"), "tls_ca /no/ca.pem"),
        ],
    )
    def test_whatever_would_stop_serve_is_found(
        self, arguments: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        urls = () if "endpoints" in arguments[1] else ("http://a",)
        assert run("check", *arguments, *urls) == 2
        error = capsys.readouterr().err
        assert says in error
        assert error.count("\n") == 1

    def test_a_picker_configuration_that_does_not_load(
        self, picker: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        Path(picker).write_text(PICKER + "- type: queue-scorrer\n")
        assert run("check", "--config", picker, "http://a") == 2
        assert "did you mean queue-scorer?" in capsys.readouterr().err


def test_show_prints_all_settings_without_secrets(settings: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show", "--config", settings, "--port", "9001") == 0
    out = capsys.readouterr().out
    assert "hunter2" not in out
    tree = yaml.safe_load(out)
    assert tree["server"]["port"] == 9001
    assert tree["breaker"]["faults"] == 3


def test_schema_is_json_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("schema") == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["$defs"]["Server"]["properties"]["port"]["maximum"] == 65535
    assert schema["$defs"]["Server"]["additionalProperties"] is False


class TestConfigOption:
    """One ``--config`` of each kind; an EndpointPickerConfig is known by its ``kind``."""

    def test_a_picker_configuration_takes_the_presets_place_and_the_rest_is_default(
        self, picker: str
    ) -> None:
        settings = parsed("--config", picker, "http://a")
        assert settings.scheduling.picker_config == picker
        assert settings.server == Settings().server

    def test_both_in_any_order(self, picker: str, settings: str) -> None:
        first, second = (
            parsed("--config", picker, "--config", settings),
            parsed("--config", settings, "--config", picker),
        )
        assert first == second
        assert (first.server.port, first.scheduling.picker_config) == (9000, picker)

    def test_a_name_that_yaml_would_read_as_something_else(
        self, picker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        Path("123").write_text(PICKER)
        assert parsed("--config", "123", "http://a").scheduling.picker_config == "123"

    def test_a_kind_that_is_misspelt_is_no_settings_file(
        self, picker: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        Path(picker).write_text(PICKER.replace("PickerConfig", "PickerConfg"))
        assert run("check", "--config", picker, "http://a") == 2
        assert "'EndpointPickerConfg' is not EndpointPickerConfig" in capsys.readouterr().err

    @pytest.mark.parametrize("which", ["picker", "settings"])
    def test_two_of_a_kind_are_refused(self, which: str, picker: str, settings: str) -> None:
        path = picker if which == "picker" else settings
        with pytest.raises(SettingsError, match=f"--config {path}: a second"):
            parsed("--config", path, "--config", path)

    def test_set_comes_after(self, picker: str, settings: str) -> None:
        assert parsed("--config", settings, "--set", "server.port=1").server.port == 1
        chosen = parsed("--config", picker, "--set", "scheduling.picker_config=other.yaml", "http://a")
        assert chosen.scheduling.picker_config == "other.yaml"

    def test_hosts_that_yaml_would_read_as_something_else(self) -> None:
        assert parsed("--host", "::", "http://a").server.host == "::"
