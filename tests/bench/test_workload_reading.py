"""Workloads from files, and the page that lists them."""

import re
from itertools import islice
from pathlib import Path

import msgspec
import pytest
import yaml

from pointsman.bench.workloads import (
    Adapters,
    AnyWorkload,
    Conversations,
    SharedPrefix,
    SloClasses,
    Unrelated,
    reference,
)
from pointsman.bench.workloads.lengths import Bimodal
from pointsman.bench.workloads.reading import KINDS, read_workload
from pointsman.errors import SettingsError

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "workloads.md"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "trace"])
def test_a_kind_by_its_name_has_its_defaults_and_comes_back_from_a_file(kind):
    workload = read_workload(kind)
    assert workload == KINDS[kind]()
    again = msgspec.convert(msgspec.json.decode(msgspec.json.encode(workload)), AnyWorkload)
    assert again == workload
    assert len(list(islice(again.calls(0), 3))) == 3


def test_a_file_holds_any_kind_and_options_change_it(tmp_path):
    file = tmp_path / "w.yaml"
    file.write_text(
        "kind: slo-classes\n"
        "parts:\n"
        "- name: chat\n"
        "  weight: 3\n"
        "  of: {kind: lora, adapters: [a, b], of: {kind: conversations}}\n"
        "- {name: batch, of: {kind: random, input_len: 9}}\n"
    )
    workload = read_workload(str(file), ["parts.1.of.output_len=7", "parts.0.weight=4"])
    assert isinstance(workload, SloClasses)
    chat, batch = workload.parts
    assert chat.of == Adapters(adapters=("a", "b"), of=Conversations())
    assert (chat.weight, batch.of) == (4, Unrelated(9, 7))


def test_parameters_may_be_given_beside_the_kind():
    workload = read_workload("shared-prefix", ["output_shape={shape: bimodal, short: 0.2}"], {"groups": 3})
    assert workload == SharedPrefix(groups=3, output_shape=Bimodal(short=0.2))


@pytest.mark.parametrize(
    ("source", "overrides", "says"),
    [
        ("chat", (), "workload: chat: no such file, and no kind; kinds are shared-prefix, random"),
        ("random", ("inputlen=3",), "random: workload.inputlen: no such setting"),
        ("random", ("input_len=0",), "random: workload.input_len: .*>= 1"),
        ("random", ("input_len=long",), "random: workload.input_len: Expected `int`"),
        ("shared-prefix", ("hot_for_calls=5",), "hot_for_calls: .*zipf"),
        ("shared-prefix", ("output_shape={shape: round}",), "output_shape.shape: Invalid value 'round'"),
        ("lora", ("of.groups=2",), "workload.of: .*`kind`"),
        ("slo-classes", ("classes=4",), "workload.classes"),
    ],
)
def test_a_mistake_names_its_key(source, overrides, says):
    with pytest.raises(SettingsError, match=says):
        read_workload(source, overrides)


def test_a_file_without_a_kind_is_told_so(tmp_path):
    (tmp_path / "w.yaml").write_text("groups: 3\n")
    with pytest.raises(SettingsError, match="kind"):
        read_workload(str(tmp_path / "w.yaml"))


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == reference.page()


def test_what_the_page_shows_can_be_read(tmp_path):
    page = PAGE.read_text()
    shown = [yaml.safe_load(text) for text in re.findall(r"`(\{kind: .*?\})`", page)]
    (block,) = re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    workloads = [tree for tree in [*shown, yaml.safe_load(block)["workload"]] if tree["kind"] in KINDS]
    assert len(workloads) >= 10
    for tree in workloads:
        (tmp_path / "w.yaml").write_text(yaml.safe_dump(tree))
        assert next(read_workload(str(tmp_path / "w.yaml")).calls(0)).prompt
    for kind in KINDS:
        assert f"## {kind}\n" in page
