"""Two vLLM servers, the gateway in front of them, and what was measured: told at the end of the run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests_vllm.servers import Engine, Gateway


@pytest.fixture(scope="session")
def engines(figures: list[str]) -> Iterator[tuple[Engine, Engine]]:
    pair = Engine("engine-0"), Engine("engine-1")
    try:
        for engine in pair:
            engine.start()
        seconds = max(engine.wait() for engine in pair)
        figures.append(f"two vLLM servers up in {seconds:.0f} s")
        yield pair
    finally:
        for engine in pair:
            engine.stop()


@pytest.fixture(scope="session")
def gateway(engines: tuple[Engine, Engine]) -> Iterator[Gateway]:
    running = Gateway(*engines)
    yield running
    assert running.stop() == 0


FIGURES = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session")
def figures(pytestconfig: pytest.Config) -> list[str]:
    """Lines for the end of the run."""
    return pytestconfig.stash.setdefault(FIGURES, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    terminalreporter.section("figures")
    for line in config.stash.get(FIGURES, []):
        terminalreporter.write_line(line)
