"""``bench`` is run from the repository's root, not installed: make it importable the same way."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import uvloop

sys.path.append(str(Path(__file__).parents[2]))


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], uvloop.Loop]]:
    """The load generator runs on uvloop."""
    return {"uvloop": uvloop.new_event_loop}
