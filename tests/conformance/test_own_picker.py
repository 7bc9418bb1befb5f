"""Every case over our picker: on its own server, and on grpc.aio with the same core."""

from __future__ import annotations

import argparse
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from pointsman.cli.picker import add_arguments, policy_file, settings_of
from pointsman.conformance import suite
from pointsman.conformance.case import CASES
from pointsman.conformance.groups import CONFIG_FILE, Group
from pointsman.conformance.start import FLAGS, OWN
from pointsman.conformance.subject import Place
from pointsman.extproc.picker import PROCESS, Picker
from pointsman.testing import aio_peer


@asynccontextmanager
async def own_picker(name: str, group: Group, folder: Path) -> AsyncIterator[tuple[Picker, Place]]:
    """What ``start.OWN`` runs, in this process and on free ports."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = [word for word in OWN[OWN.index("picker") + 1 :] if word != FLAGS]
    filled = [str(folder / CONFIG_FILE) if word == "{config}" else word for word in words]
    free = ["0" if word.endswith("port}") else word for word in filled]
    args = parser.parse_args(
        [*free, "--host", "127.0.0.1", "--drain-timeout", "1s", *group.start_flags(False)]
    )
    with policy_file(args):
        settings = settings_of(args)
        async with Picker(settings, out=io.StringIO()).running() as picker:
            yield (
                picker,
                Place(
                    f"127.0.0.1:{picker.port}",
                    group.tls,
                    f"127.0.0.1:{picker.front.health_port}",
                    f"http://127.0.0.1:{picker.admin_port}/metrics",
                ),
            )


@asynccontextmanager
async def on_our_server(name: str, group: Group, folder: Path) -> AsyncIterator[Place]:
    async with own_picker(name, group, folder) as (_, place):
        yield place


@asynccontextmanager
async def on_grpc_aio(name: str, group: Group, folder: Path) -> AsyncIterator[Place]:
    async with (
        own_picker(name, group, folder) as (picker, place),
        aio_peer.serving({PROCESS: picker.front.processor}) as port,
    ):
        yield Place(f"127.0.0.1:{port}", False, place.health_address, place.metrics_url)


LACKS = {"models-in-metrics"}
"""Extensions that we do not have: labels of our metrics are bounded, and a client may invent names."""


@pytest.mark.parametrize("launch", [on_our_server, on_grpc_aio])
async def test_every_case_passes(launch: suite.Launch, tmp_path: Path) -> None:
    cases = [case for case in suite.chosen(()) if launch is on_our_server or case.group != "secure"]
    results = await suite.run(cases, launch, tmp_path)
    failed = {r.case.id: r.reason for r in results if r.verdict == "fail"}
    assert {name: failed[name] for name in failed if name not in LACKS} == {}
    assert failed.keys() == LACKS
    assert not any(CASES[name].level != "extension" for name in LACKS)
    assert {r.case.id for r in results if r.verdict == "skip"} == {c.id for c in CASES.values() if c.skipped}
