"""docs/reference/plugins.md is what the registry says."""

from __future__ import annotations

import re
from pathlib import Path

from pointsman.scheduling import reference
from pointsman.scheduling.picker_config import load_picker_config

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "plugins.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == reference.page(), (
        "run: python -m pointsman.scheduling.reference > docs/reference/plugins.md"
    )


def test_the_example_of_the_configuration_page_loads() -> None:
    text = (PAGE.parents[1] / "llm-d-config.md").read_text()
    snippets = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert snippets
    for snippet in snippets:
        assert load_picker_config(snippet).profiles
