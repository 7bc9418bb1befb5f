"""Plugins by name: built from parameters, or refused in words that name the mistake."""

from __future__ import annotations

import pytest

from pointsman.errors import SettingsError
from pointsman.registry import build, own_name, plugins


def test_parameters_are_fields_in_camel_case() -> None:
    plugin = build("token-load-scorer", {"queueThresholdTokens": 7}, "here")
    assert plugin.queue_threshold_tokens == 7  # type: ignore[attr-defined]


def test_a_misspelt_parameter_is_named() -> None:
    with pytest.raises(SettingsError, match=r"here: token-load-scorer: .*`queueTresholdTokens`"):
        build("token-load-scorer", {"queueTresholdTokens": 7}, "here")


def test_a_value_of_the_wrong_type_is_named() -> None:
    with pytest.raises(SettingsError, match=r"here: token-load-scorer: .*`\$.queueThresholdTokens`"):
        build("token-load-scorer", {"queueThresholdTokens": "many"}, "here")


def test_a_missing_parameter_is_named() -> None:
    with pytest.raises(SettingsError, match=r"here: file-discovery: .*`path`"):
        build("file-discovery", {}, "here")


def test_an_unknown_type_comes_with_the_closest_known_one() -> None:
    with pytest.raises(
        SettingsError, match=r"here: unknown plugin type 'queue-scorrer'; did you mean queue-scorer\?"
    ):
        build("queue-scorrer", None, "here")


def test_an_alias_is_the_same_plugin_under_an_older_name() -> None:
    known = plugins()
    assert known["by-label-selector"] is known["label-selector-filter"]
    assert own_name(known["by-label-selector"]) == "label-selector-filter"


def test_each_instance_has_a_state_of_its_own() -> None:
    one, other = build("round-robin-picker", None, "a"), build("round-robin-picker", None, "b")
    assert one._credit is not other._credit  # type: ignore[attr-defined]
