"""A model's tokenizer and chat templates from the folder that its engine loads them from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from jinja2 import TemplateError
from tokenizers import Tokenizer as Library
from tokenizers.processors import TemplateProcessing

from pointsman.errors import SettingsError
from pointsman.tokens.asked import Chat, Texts
from pointsman.tokens.conversation import NotText, conversation, tools
from pointsman.tokens.cuts import Cuts
from pointsman.tokens.library import fastest
from pointsman.tokens.memory import Memory
from pointsman.tokens.template import ChatTemplate
from pointsman.tokens.tokenizer import Plan, Tokenizer

T = TypeVar("T")

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
WITH_TOOLS = "tool_use"
"""Of several templates, the one for requests with tools; the others are for ``default``."""
DOWNLOADED = ("tokenizer*", "special_tokens_map.json", "chat_template*", "additional_chat_templates/*")


class _Content(msgspec.Struct):
    content: str


class _Named(msgspec.Struct):
    name: str
    template: str


class _Template(msgspec.Struct):
    chat_template: str | None = None


class _Config(msgspec.Struct):
    """Of tokenizer_config.json."""

    bos_token: str | _Content | None = None
    eos_token: str | _Content | None = None
    unk_token: str | _Content | None = None
    sep_token: str | _Content | None = None
    pad_token: str | _Content | None = None
    cls_token: str | _Content | None = None
    mask_token: str | _Content | None = None
    chat_template: str | list[_Named] | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None


class Model:
    """Tokenises prompts of one model as its engine does."""

    def __init__(self, tokenizer: Tokenizer, templates: Mapping[str, ChatTemplate]) -> None:
        self.tokenizer = tokenizer
        self._templates = templates

    def texts(self, asked: Texts | Chat) -> list[str]:
        """The prompts as they are tokenised; ``NotText`` where the engine must be asked."""
        if isinstance(asked, Texts):
            return list(asked.texts)
        template = self._templates.get(WITH_TOOLS if asked.tools is not None else "default")
        template = template or self._templates.get("default")
        if template is None or asked.template is not None or "chat_template" in asked.variables:
            raise NotText("template")
        messages = conversation(
            asked.messages, parts=template.takes_parts, developer=template.knows_developer
        )
        variables: dict[str, Any] = dict(asked.variables)
        if asked.tools is not None:
            variables["tools"] = tools(asked.tools)
        return [template.render(messages, variables)]

    def plans(self, asked: Texts | Chat) -> list[Plan]:
        return [self.tokenizer.plan(text) for text in self.texts(asked)]


def load(name: str, path: str, memory: Memory, allow_download: bool) -> Model:
    """``SettingsError`` names the key and the file that cannot be used."""
    where = f"tokens.models.{name}"
    folder = _folder(path, where, allow_download)
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise SettingsError(
            f"{where}: {file} is missing; only tokenizers that have this file can be used here"
        )
    try:
        library = Library.from_file(str(file))
    except Exception as exc:  # the library raises nothing more special
        raise SettingsError(f"{where}: {file}: {exc}") from exc
    config = _read(folder / "tokenizer_config.json", _Config, where) or _Config()
    special = {key: _content(getattr(config, key)) for key in SPECIAL if getattr(config, key) is not None}
    _settle_ends(library, config, special)
    templates = {}
    for use, source in _sources(folder, config, where).items():
        try:
            templates[use] = ChatTemplate(source, special)
        except TemplateError as exc:
            raise SettingsError(f"{where}: chat template {use!r} in {folder}: {exc}") from exc
    return Model(Tokenizer(fastest(library), Cuts(library.to_str()), memory), templates)


def _folder(path: str, where: str, allow_download: bool) -> Path:
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if not allow_download:
        raise SettingsError(
            f"{where}: {path} is no folder; to fetch it from a model hub set tokens.allow_download"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=list(DOWNLOADED)))
    except Exception as exc:  # of the library, its HTTP client or the file system
        raise SettingsError(f"{where}: {path} cannot be downloaded: {exc}") from exc


def _read(file: Path, kind: type[T], where: str) -> T | None:
    if not file.is_file():
        return None
    try:
        return msgspec.json.decode(file.read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise SettingsError(f"{where}: {file}: {exc}") from exc


def _content(token: str | _Content) -> str:
    return token if isinstance(token, str) else token.content


def _sources(folder: Path, config: _Config, where: str) -> Mapping[str, str]:
    """Templates by use, the later kinds of file before the older."""
    given = config.chat_template
    found = {"default": given} if isinstance(given, str) else {one.name: one.template for one in given or ()}
    # A processor's template is for requests without tools, vLLM says; its models have no other one.
    of_processor = _read(folder / "chat_template.json", _Template, where)
    if of_processor is not None and of_processor.chat_template is not None:
        if "default" in found:
            found.setdefault(WITH_TOOLS, found["default"])
        found["default"] = of_processor.chat_template
    for file in (folder / "additional_chat_templates").glob("*.jinja"):
        found[file.stem] = _text(file, where)
    if (folder / "chat_template.jinja").is_file():
        found["default"] = _text(folder / "chat_template.jinja", where)
    return {use: source for use, source in found.items() if use in ("default", WITH_TOOLS)}


def _text(file: Path, where: str) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise SettingsError(f"{where}: {file}: {exc}") from exc


def _settle_ends(library: Library, config: _Config, special: Mapping[str, str]) -> None:
    """``add_bos_token`` and ``add_eos_token`` of tokenizer_config.json, where given, decide instead of
    tokenizer.json which tokens are put around a text, as in transformers 5.
    """
    if config.add_bos_token is None and config.add_eos_token is None:
        return
    begin = special.get("bos_token") if config.add_bos_token else None
    end = special.get("eos_token") if config.add_eos_token else None
    around = [(token, library.token_to_id(token)) for token in (begin, end) if token]
    single = " ".join(part for part in (begin, "$A", end) if part)
    library.post_processor = TemplateProcessing(single=single, special_tokens=around)
