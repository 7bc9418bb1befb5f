"""The command line: subcommands, and mistakes that are one line and code 2."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pointsman import __version__
from pointsman.cli.main import SUBCOMMANDS, main


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    code = exit_.value.code
    assert isinstance(code, int)
    return code


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"pointsman {__version__}\n"


def test_help_names_every_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    out = capsys.readouterr().out
    assert all(name in out for name in SUBCOMMANDS)


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_every_subcommand_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(name, "--help") == 0
    assert f"pointsman {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "required: COMMAND"),
        (("serv",), "invalid choice: 'serv'"),
        (("serve",), "endpoints: name at least one"),
        (("serve", "--prot", "1"), "unrecognized arguments: --prot"),
        (("serve", "--port", "x"), "invalid int value: 'x'"),
        (("serve", "--port", "70000", "http://a"), "server.port"),
        (("serve", "localhost:8000"), "endpoints[0].url: localhost:8000: must start with http"),
        (("serve", "http://a", "--set", "sever.port=1"), "sever: no such setting"),
        (("serve", "http://a", "--set", "scheduling.preset=llm-d-afinity"), "did you mean llm-d-affinity?"),
        (("serve", "http://a", "--config", "/no/such.yaml"), "/no/such.yaml: cannot be read"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(
    arguments: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert says in streams.err
    assert streams.err.startswith("pointsman")
    assert streams.err.count("\n") == 1


def test_it_is_a_module_too_and_imports_only_the_chosen_subcommand() -> None:
    code = """
import sys
from pointsman.cli.main import main
try:
    main(["config", "schema"])
except SystemExit:
    print([name for name in sys.modules if name.startswith("pointsman.cli.")], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pointsman.cli.config" in done.stderr
    assert "pointsman.cli.bench" not in done.stderr
    version = subprocess.run(
        [sys.executable, "-m", "pointsman", "--version"], capture_output=True, check=True
    )
    assert version.stdout.startswith(b"pointsman")
