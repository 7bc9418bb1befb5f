"""Settings: the file, overrides, what is refused and how it is named, and that every knob is read."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import pointsman
from pointsman import config
from pointsman.config import Endpoint, Settings, load, redacted, reference, split_url
from pointsman.errors import SettingsError

SOURCES = Path(pointsman.__file__).parent


def write(path: Path, text: str) -> str:
    file = path / "pointsman.yaml"
    file.write_text(text)
    return str(file)


def leaves(cls: type[msgspec.Struct]) -> Iterator[tuple[str, str]]:
    """(class, field) of each key that is not a section."""
    for field in msgspec.structs.fields(cls):
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            yield from leaves(field.type)
        else:
            yield cls.__name__, field.name


def attributes_read() -> set[str]:
    """Names that code outside config.py reads from an object."""
    return {
        node.attr
        for path in SOURCES.rglob("*.py")
        if path != Path(config.__file__)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }


def test_every_knob_is_read_somewhere() -> None:
    knobs = {*leaves(Settings), *leaves(Endpoint)}
    assert len(knobs) > 40
    read = attributes_read()
    assert {knob for knob in knobs if knob[1] not in read} == set()


def test_every_knob_says_what_it_is() -> None:
    page = reference()
    for _, name in (*leaves(Settings), *leaves(Endpoint)):
        assert re.search(rf"^\| `{name}` \| \S.* \| \S.* \|$", page, re.MULTILINE), name


class TestSources:
    def test_defaults_alone(self) -> None:
        settings = load()
        assert (settings.server.port, settings.admin.port, settings.endpoints) == (8080, 8081, ())
        assert settings.admin.host == "127.0.0.1", "the admin port is not for everybody"

    def test_file_then_overrides_then_urls(self, tmp_path: Path) -> None:
        text = "endpoints: [{url: http://a:1, weight: 2}]\nserver: {port: 9000, host: 127.0.0.1}\n"
        settings = load(write(tmp_path, text), ["server.port=9001"], ["http://b:2"])
        assert [(e.url, e.weight) for e in settings.endpoints] == [("http://a:1", 2.0), ("http://b:2", 1.0)]
        assert (settings.server.port, settings.server.host) == (9001, "127.0.0.1")

    def test_overrides_are_yaml_and_reach_into_lists(self, tmp_path: Path) -> None:
        path = write(tmp_path, "endpoints: [{url: http://a:1}]")
        settings = load(
            path, ["endpoints.0.weight=3", "server.allow_paths=[/sleep, /x*]", "scheduling.seed=null"]
        )
        assert settings.endpoints[0].weight == 3.0
        assert settings.server.allow_paths == ("/sleep", "/x*")
        assert settings.scheduling.seed is None

    def test_empty_files_and_empty_sections_are_defaults(self, tmp_path: Path) -> None:
        assert load(write(tmp_path, "")) == load()
        assert load(write(tmp_path, "server:\nendpoints:\n")) == load()

    def test_json_is_yaml(self, tmp_path: Path) -> None:
        assert load(write(tmp_path, json.dumps({"log": {"level": "debug"}}))).log.level == "debug"


class TestRefused:
    @pytest.mark.parametrize(
        ("text", "names"),
        [
            ("sever: {port: 1}", "sever: no such setting"),
            ("server: {prot: 1}", r"server\.prot: no such setting"),
            ("endpoints: [{url: http://a, wieght: 1}]", r"endpoints\[0\]\.wieght: no such setting"),
            ("server: {port: 70000}", r"server\.port: .*<= 65535"),
            ("server: {port: '80'}", r"server\.port: .*`int`"),
            ("metrics: {interval_s: 0.01}", r"metrics\.interval_s: .*0\.05"),
            ("log: {level: loud}", r"log\.level: .*loud"),
            ("endpoints: {url: http://a}", "endpoints: .*array"),
            ("endpoints: [{}]", r"endpoints\[0\]: .*`url`"),
            ("- a", "a mapping of settings is expected"),
            ("a: [", "not YAML"),
            ("endpoints: [{url: http://a}, {url: tcp://b}]", r"endpoints\[1\]\.url: tcp://b"),
            ("endpoints: [{url: http://a, metrics_url: /metrics}]", r"endpoints\[0\]\.metrics_url"),
            ("endpoints: [{url: http://a, api_key_env: NOT_SET_ANYWHERE}]", "NOT_SET_ANYWHERE is not set"),
            ('endpoints: [{url: http://a, api_key: "a\\nb"}]', "authorization has characters"),
            ("endpoints: [{url: http://a, headers: {'x y': z}}]", "x y has characters"),
            ("endpoints: [{url: http://a, headers: {x: '\u20ac'}}]", "header x has characters"),
            ("server: {tls_cert: c.pem}", "tls_cert and server.tls_key: give both"),
        ],
    )
    def test_in_a_file(self, text: str, names: str, tmp_path: Path) -> None:
        with pytest.raises(SettingsError, match=names) as raised:
            load(write(tmp_path, text))
        assert "\n" not in raised.value.message

    @pytest.mark.parametrize(
        ("override", "names"),
        [
            ("server.port", "write it as section.key=value"),
            ("=1", "write it as section.key=value"),
            ("server.prot=1", r"server\.prot: no such setting"),
            ("server.port=[", "--set server.port=.*not YAML"),
            ("server.port.deep=1", "deep is not inside a section"),
            ("endpoints.7.weight=1", "no 7 in that list"),
            ("endpoints.x.weight=1", "no x in that list"),
        ],
    )
    def test_in_an_override(self, override: str, names: str, tmp_path: Path) -> None:
        with pytest.raises(SettingsError, match=names):
            load(write(tmp_path, "endpoints: [{url: http://a}]\nserver: {port: 1}"), [override])

    def test_files_that_cannot_be_read(self, tmp_path: Path) -> None:
        with pytest.raises(SettingsError, match="cannot be read: No such file"):
            load(str(tmp_path / "none.yaml"))
        with pytest.raises(SettingsError, match="cannot be read"):
            load(str(tmp_path))
        binary = tmp_path / "binary"
        binary.write_bytes(b"\xff\xfe\x00")
        with pytest.raises(SettingsError, match="is not text"):
            load(str(binary))

    @given(st.text(max_size=40), st.text(max_size=20))
    def test_any_override_works_or_is_the_users_mistake(self, key: str, value: str) -> None:
        with suppress(SettingsError):
            load(None, [f"{key}={value}"])


class TestUrls:
    @pytest.mark.parametrize(
        ("url", "tls", "authority", "prefix"),
        [
            ("http://a", False, "a:80", ""),
            ("https://a/", True, "a:443", ""),
            ("http://10.0.0.1:8000/v2/base/", False, "10.0.0.1:8000", "/v2/base"),
            ("http://[fd00::1]:8000", False, "[fd00::1]:8000", ""),
        ],
    )
    def test_taken_apart(self, url: str, tls: bool, authority: str, prefix: str) -> None:
        parts = split_url(url, "url")
        assert (parts.tls, parts.authority, parts.prefix) == (tls, authority, prefix)

    @pytest.mark.parametrize(
        ("url", "why"),
        [
            ("a:8000", "must start with http"),
            ("ftp://a", "must start with http"),
            ("http://", "no host"),
            ("http://a:x", "[Pp]ort"),
            ("http://a:99999", "[Pp]ort"),
            ("http://[::1", "Invalid IPv6"),
            ("http://user:pass@a", "credentials do not belong"),
            ("http://a?x=1", "query or fragment"),
        ],
    )
    def test_refused(self, url: str, why: str) -> None:
        with pytest.raises(SettingsError, match=f"^key: .*{why}"):
            split_url(url, "key")

    def test_a_password_is_not_repeated_in_the_message(self) -> None:
        with pytest.raises(SettingsError) as raised:
            split_url("http://user:hunter2@a", "key")
        assert "hunter2" not in raised.value.message


class TestRedacted:
    def test_secrets_are_blank_and_the_rest_is_whole(self, tmp_path: Path) -> None:
        text = "endpoints: [{url: http://a, api_key: hunter2, headers: {X-Api-Key: hunter3}}]"
        tree = redacted(load(write(tmp_path, text)))
        assert "hunter" not in json.dumps(tree)
        assert tree["endpoints"][0]["api_key"] == "***"
        assert tree["endpoints"][0]["headers"] == {"X-Api-Key": "***"}
        assert tree["server"]["port"] == 8080

    @pytest.mark.parametrize(
        "url", ["redis://:hunter2@a:1/0", "rediss://u:hunt/er2@a", "redis://a?password=hunter2"]
    )
    def test_an_address_is_shown_without_its_password(self, url: str) -> None:
        shown = redacted(load(overrides=[f"shared_index.redis={url}"]))["shared_index"]["redis"]
        assert "er2" not in shown
        assert shown.replace("***", "hunt/er2" if "u:" in url else "hunter2") == url

    def test_without_secrets_it_loads_again_as_the_same_settings(self, tmp_path: Path) -> None:
        settings = load(None, ["server.port=1234", "scheduling.seed=5"], ["http://a:1"])
        assert load(write(tmp_path, yaml.safe_dump(redacted(settings)))) == settings
