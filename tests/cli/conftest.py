"""Commands bring an event loop of their own, in a process where pytest's plugins have made one already."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest


@pytest.fixture
def no_stray_loop() -> Iterator[None]:
    """For synchronous tests that run a command in this process. looptime asks for the current event loop,
    which makes one; the command's Runner takes its place, and it would be collected unclosed, to the harm of
    whichever test runs at that moment.
    """
    policy = asyncio.get_event_loop_policy()
    try:
        loop = policy.get_event_loop()
    except RuntimeError:
        loop = policy.new_event_loop()
        policy.set_event_loop(loop)
    yield
    loop.close()
    policy.set_event_loop(None)
