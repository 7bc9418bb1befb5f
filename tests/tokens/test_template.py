"""Chat templates are rendered as the library they are written for renders them."""

from __future__ import annotations

from datetime import datetime

import pytest
from jinja2 import TemplateError

from pointsman.tokens.conversation import NotText
from pointsman.tokens.template import ChatTemplate, environment

HELLO = [{"role": "user", "content": "Hello"}]


def render(source, messages=HELLO, **variables):
    return ChatTemplate(source, {"bos_token": "<s>"}).render(messages, variables)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ bos_token }}{{ messages[0].content }}", "<s>Hello"),
        ("{{ messages[0]['content'] | tojson }}", '"Hello"'),
        ("{{ {'a': '<é>', 'b': [1, 2.5, true, none]} | tojson }}", '{"a": "<é>", "b": [1, 2.5, true, null]}'),
        ("{{ {'b': 1, 'a': 2} | tojson(indent=2, sort_keys=true) }}", '{\n  "a": 2,\n  "b": 1\n}'),
        ("{{ {'a': 'é'} | tojson(ensure_ascii=true, separators=(',', ':')) }}", '{"a":"\\u00e9"}'),
        ("  {% if true %}\nyes\n  {% endif %}\nno", "yes\nno"),
        (
            "{% for i in [1, 2, 3, 4] %}{% if i == 2 %}{% continue %}{% endif %}{% if i == 4 %}{% break %}"
            "{% endif %}{{ i }}{% endfor %}",
            "13",
        ),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "Hello!"),
        ("{{ tools is none }} {{ documents is none }} {{ other is defined }}", "True True False"),
        ("{{ add_generation_prompt }} {{ extra }}", "True more"),
        ("a\n", "a"),
    ],
)
def test_rendering(source, text):
    assert render(source, add_generation_prompt=True, extra="more") == text


def test_the_date_is_the_environments():
    made = environment(lambda: datetime(2026, 2, 3))
    assert made.from_string("{{ strftime_now('%d %b %Y') }}").render() == "03 Feb 2026"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no system role') }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}{{ messages.__class__.__base__.__subclasses__() }}",
        "{% for i in range(1000000) %}{% endfor %}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content + none }}",
    ],
)
def test_a_template_that_refuses_or_fails(source):
    with pytest.raises(NotText) as raised:
        render(source)
    assert raised.value.reason == "template"


def test_a_template_that_cannot_be_compiled():
    with pytest.raises(TemplateError):
        ChatTemplate("{% if %}", {})


TURNS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]{% endfor %}"
STRIPPED = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}[end]{% endfor %}"
PARTS = (
    "{% for m in messages %}[{{ m.role }}]{% for p in m.content %}{{ p.text }}{% endfor %}[end]{% endfor %}"
)
BEGUN = [*HELLO, {"role": "assistant", "content": "It is "}]


@pytest.mark.parametrize(
    ("source", "messages", "text"),
    [
        (TURNS, BEGUN, "[user]Hello[end][assistant]It is "),
        (STRIPPED, BEGUN, "[user]Hello[end][assistant]It is"),
        (
            PARTS,
            [
                {
                    "role": "assistant",
                    "content": [{"type": "text", "text": "It "}, {"type": "text", "text": "is"}],
                }
            ],
            "[assistant]It is",
        ),
    ],
)
def test_a_last_message_that_is_to_be_continued(source, messages, text):
    assert render(source, messages, continue_final_message=True) == text
    assert "TAG" not in str(messages)


def test_a_template_without_the_last_message_cannot_continue_it():
    with pytest.raises(NotText):
        render("{{ messages[0].content }}", BEGUN, continue_final_message=True)


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        (TURNS, False),
        (PARTS, True),
        ("{% for m in messages %}{% for p in m['content'] | list %}{% endfor %}{% endfor %}", True),
        ("{% for m in messages %}{% for p in m.content[1:] %}{% endfor %}{% endfor %}", True),
        ("{% for m in messages %}{% set content = m.content %}"
         "{% for p in content %}{% endfor %}{% endfor %}", True),
        ("{% for m in messages %}{% for c in m.tool_calls %}{{ c }}{% endfor %}"
         "{{ m.content }}{% endfor %}", False),
        ("{% macro show(x) %}{% for p in x %}{% endfor %}{% endmacro %}"
         "{% for m in messages %}{{ show(m.content) }}{% endfor %}", True),
        ("{% macro show(x) %}{% for p in x %}{% endfor %}{% endmacro %}"
         "{% for m in messages %}{{ show(x=m.content) }}{% endfor %}", True),
        ("{% macro show(x) %}{% for p in x %}{% endfor %}{% endmacro %}"
         "{% for m in messages %}{{ show(m.tool_calls) }}{{ m.content }}{% endfor %}", False),
    ],
)  # fmt: skip
def test_whether_it_takes_the_parts_of_a_content(source, parts):
    assert ChatTemplate(source, {}).takes_parts is parts
