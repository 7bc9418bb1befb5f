"""A model's tokenizer and chat templates out of its folder, and what is said of a folder that cannot be
used.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Library

from pointsman.api.token_ids import pack
from pointsman.errors import SettingsError
from pointsman.tokens.asked import Chat, Texts
from pointsman.tokens.conversation import NotText
from pointsman.tokens.folder import Model, load
from pointsman.tokens.memory import Memory

HELLO = [{"role": "user", "content": "Hello"}]
TOOLS = [{"type": "function", "function": {"name": "f"}}]


def model_in(folder: Path) -> Model:
    return load("m", str(folder), Memory(1 << 20), allow_download=False)


def configure(folder: Path, **fields: object) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def rendered(model: Model, tools: object = None) -> str:
    (text,) = model.texts(Chat(HELLO, tools, {"add_generation_prompt": True}))  # type: ignore[arg-type]
    return text


def test_a_folder(folder: Path, qwen: Library) -> None:
    model = model_in(folder)
    assert rendered(model) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert rendered(model, TOOLS).startswith(
        '<|im_start|>tools [{"type": "function", "function": {"name": "f"'
    )
    assert model.texts(Texts(("a", "b"))) == ["a", "b"]
    assert model.tokenizer.encode("Hello", add_special=True) == pack(qwen.encode("Hello").ids)


def test_tokens_around_a_text_as_the_configuration_says(folder: Path, qwen: Library) -> None:
    bare = qwen.encode("Hello", add_special_tokens=False).ids
    begin, end = qwen.token_to_id("<s>"), qwen.token_to_id("</s>")
    for begins, ends, expected in [
        (True, False, [begin, *bare]),
        (False, True, [*bare, end]),
        (False, False, bare),
        (True, True, [begin, *bare, end]),
    ]:
        configure(folder, add_bos_token=begins, add_eos_token=ends)
        assert model_in(folder).tokenizer.encode("Hello", add_special=True) == pack(expected)


def test_a_template_in_a_file_of_its_own_comes_first(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("of the file: {{ messages[0].content }}{{ eos_token }}")
    assert rendered(model_in(folder)) == "of the file: Hello</s>"


def test_templates_by_use(folder: Path) -> None:
    both = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    configure(folder, chat_template=both)
    assert (rendered(model_in(folder)), rendered(model_in(folder), TOOLS)) == ("plain", "tools")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("newer")
    assert rendered(model_in(folder), TOOLS) == "newer"


def test_a_processors_template_is_for_requests_without_tools(folder: Path) -> None:
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "of the processor"}))
    model = model_in(folder)
    assert rendered(model) == "of the processor"
    assert rendered(model, TOOLS).startswith("<|im_start|>tools")


def test_without_a_template_chats_are_left_to_the_engine(folder: Path) -> None:
    configure(folder, chat_template=None)
    model = model_in(folder)
    with pytest.raises(NotText):
        rendered(model)
    assert model.texts(Texts(("a",))) == ["a"]


def test_a_template_that_the_request_brings_is_not_run_here(folder: Path) -> None:
    model = model_in(folder)
    for asked in (Chat(HELLO, None, {}, template="x"), Chat(HELLO, None, {"chat_template": "x"})):
        with pytest.raises(NotText) as raised:
            model.texts(asked)
        assert raised.value.reason == "template"


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("tokenizer.json", None, "tokenizer.json is missing"),
        ("tokenizer.json", "{}", "tokenizer.json"),
        ("tokenizer.json", "not JSON", "tokenizer.json"),
        ("tokenizer_config.json", "{", "tokenizer_config.json"),
        ("tokenizer_config.json", '{"chat_template": 7}', "tokenizer_config.json"),
        ("tokenizer_config.json", '{"chat_template": "{% if %}"}', "chat template 'default'"),
        ("chat_template.jinja", "{{ a", "chat template 'default'"),
    ],
)
def test_a_folder_that_cannot_be_used(folder: Path, file: str, content: str | None, says: str) -> None:
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    with pytest.raises(SettingsError) as raised:
        model_in(folder)
    assert raised.value.message.startswith("tokens.models.m: ")
    assert says in raised.value.message


def test_nothing_is_downloaded_unless_asked() -> None:
    with pytest.raises(SettingsError, match=r"no folder; .* set tokens\.allow_download"):
        load("m", "org/model", Memory(1 << 20), allow_download=False)


def test_what_cannot_be_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SettingsError, match=r"tokens\.models\.m: org/model cannot be downloaded"):
        load("m", "org/model", Memory(1 << 20), allow_download=True)
