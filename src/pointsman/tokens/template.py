"""A model's chat template: a conversation becomes the text that is tokenised, as transformers renders it.

The environment's rules (trimmed blocks, the sandbox, loop controls, a ``tojson`` that escapes nothing, the
``generation`` tag, ``raise_exception`` and ``strftime_now``) are those that templates are written for;
source: transformers 5.19, utils/chat_template_utils.py.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pointsman.tokens.conversation import NotText

Message = dict[str, Any]


class _Generation(Extension):
    """``{% generation %}`` marks what the assistant wrote; for us it is what is inside."""

    tags = {"generation"}  # noqa: RUF012 - the base class has a plain set

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def environment(now: Callable[[], datetime] = datetime.now) -> ImmutableSandboxedEnvironment:
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _raise
    made.globals["strftime_now"] = lambda form: now().strftime(form)
    return made


class ChatTemplate:
    """A compiled template; ``special`` are the model's special tokens by name (``bos_token``, ...)."""

    def __init__(self, source: str, special: Mapping[str, str]) -> None:
        """``TemplateError`` when it cannot be compiled."""
        made = environment()
        self._template = made.from_string(source)
        self._source = source
        self._special = special
        self.takes_parts = any(_loops_over_content(made.parse(source)))
        """It goes through the parts of a message's content itself; others are given it as one text."""
        self.knows_developer = any(quoted in source for quoted in ('"developer"', "'developer'"))

    def render(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> str:
        """The text; ``NotText`` where the template refuses or fails."""
        values = {**self._special, "tools": None, "documents": None, **variables}
        unfinished = values.pop("continue_final_message", False)
        try:
            if not unfinished:
                return self._template.render(messages=messages, **values)
            return self._unfinished(copy.deepcopy(list(messages)), values)
        except Exception as exc:  # a template is a program of somebody else's
            raise NotText("template") from exc

    def _unfinished(self, messages: list[Message], values: Mapping[str, Any]) -> str:
        """Cut off where the last message's text ends, so that the model goes on with it."""
        last = messages[-1]
        content = last["content"]
        if isinstance(content, str):
            last["content"] = content + _MARK
        else:
            part = next(part for part in reversed(content) if "text" in part)
            content, part["text"] = part["text"], part["text"] + _MARK
        text = self._template.render(messages=messages, **values)
        at = text.rindex(_MARK.strip())
        if content.strip() not in text:
            raise NotText("template")
        return text[:at] if text.startswith(_MARK, at) else text[:at].rstrip()


_MARK = "CONTINUE_FINAL_MESSAGE_TAG "
"""Its blank tells whether the template strips what follows a text."""


def _loops_over_content(tree: nodes.Template) -> Iterator[bool]:
    """A True for each loop over a message's ``content``, or over a macro's parameter that was given one.

    What vLLM and SGLang call the content format ``openai``; found in the same way as vLLM does.
    """
    inside = {id(loop) for macro in tree.find_all(nodes.Macro) for loop in macro.find_all(nodes.For)}
    for loop in tree.find_all(nodes.For):
        over = _bare(loop.iter)
        if _is_content(over) or (
            isinstance(over, nodes.Name) and over.name == "content" and id(loop) not in inside
        ):
            yield True
    for macro in tree.find_all(nodes.Macro):
        given = set(_given_content(tree, macro))
        for loop in macro.find_all(nodes.For):
            over = _bare(loop.iter)
            if isinstance(over, nodes.Name) and over.name in given:
                yield True


def _given_content(tree: nodes.Template, macro: nodes.Macro) -> Iterator[str]:
    """Parameters of the macro that somewhere are given a message's content."""
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Name) and call.node.name == macro.name:
            for parameter, value in zip(macro.args, call.args, strict=False):
                if _is_content(_bare(value)):
                    yield parameter.name
            for keyword in call.kwargs:
                if isinstance(keyword, nodes.Keyword) and _is_content(_bare(keyword.value)):
                    yield keyword.key


def _bare(node: nodes.Node | None) -> nodes.Node | None:
    """Without filters, tests and slices around it."""
    while isinstance(node, nodes.Filter | nodes.Test) or (
        isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
    ):
        node = node.node
    return node


def _is_content(node: nodes.Node | None) -> bool:
    if isinstance(node, nodes.Getattr):
        return node.attr == "content" and isinstance(node.node, nodes.Name)
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
        return node.arg.value == "content" and isinstance(node.node, nodes.Name)
    return False
