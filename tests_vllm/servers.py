"""Real vLLM servers on loopback, and ``pointsman serve``, each a process of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

HOME = Path(__file__).parent.parent / "out" / "vllm"
START_S = 300
POLL_S = 0.05
BLOCK_TOKENS = 32
"""vLLM's CPU attention takes multiples of 32 only."""
KV_BLOCKS = 1024
MODEL = "tiny"

SERVE = (
    *("--served-model-name", MODEL, "--load-format", "dummy", "--dtype", "bfloat16", "--enforce-eager"),
    *("--max-model-len", "8192", "--max-num-seqs", "16", "--max-num-batched-tokens", "2048"),
    *("--block-size", str(BLOCK_TOKENS), "--num-gpu-blocks-override", str(KV_BLOCKS)),
    *("--enable-prefix-caching", "--enable-prompt-tokens-details"),
)
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOOPBACK_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as response:
        body: bytes = response.read()
    return body


def eventually(holds: Callable[[], bool], seconds: float, what: str) -> float:
    """Seconds until ``holds()`` was true; asked again until then."""
    start = time.monotonic()
    while not holds():
        assert time.monotonic() - start < seconds, f"not within {seconds} s: {what}"
        time.sleep(POLL_S)
    return time.monotonic() - start


class Engine:
    """One ``vllm serve``, with ``more`` options and variables. It keeps its port when it is started again."""

    def __init__(self, name: str, *more: str, variables: Mapping[str, str] | None = None) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.name = f"127.0.0.1:{self.port}"
        self.url = f"http://{self.name}"
        self._more = more
        self._variables = variables or {}
        self._log = HOME / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def with_options(self, *more: str) -> Engine:
        """Options that need its name. Before it is started."""
        self._more += more
        return self

    def start(self) -> None:
        vllm = HOME / ".venv" / "bin" / "vllm"
        command = ["nice", "-n", "10", vllm, "serve", HOME / MODEL, *SERVE, *self._more]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        path = f"{vllm.parent}:{os.environ['PATH']}"
        environment = {**os.environ, **ENVIRONMENT, **self._variables, "PATH": path}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def session(self) -> int:
        """Of all its processes."""
        assert self._process
        return self._process.pid

    def _healthy(self) -> bool:
        assert self._process
        assert self._process.poll() is None, f"vLLM has ended; see {self._log}"
        try:
            get(f"{self.url}/health")
        except OSError:
            return False
        return True

    def wait(self) -> float:
        """Seconds until it answered."""
        return eventually(self._healthy, START_S, f"vLLM at {self.url} answers; see {self._log}")

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End the server and all its processes, which are a session of their own."""
        process, self._process = self._process, None
        if process is None:
            return
        os.killpg(process.pid, how)
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # children that outlived it
        process.wait()

    def metrics(self) -> Counter[str]:
        """Each metric's sum over its series."""
        found: Counter[str] = Counter()
        for line in get(f"{self.url}/metrics").decode().splitlines():
            if not line.startswith("#"):
                labelled, _, value = line.rpartition(" ")
                found[labelled.partition("{")[0]] += float(value)
        return found


class Gateway:
    """``pointsman serve`` in front of the engines; what it printed is in ``told``."""

    def __init__(self, *engines: Engine, settings: Sequence[str] = ()) -> None:
        command = [sys.executable, "-m", "pointsman", "serve", *(engine.url for engine in engines)]
        command += ["--host", "127.0.0.1", "--port", "0", "--admin-port", "0"]
        command += ["--set", "server.endpoint_header=true", "--set", "scheduling.seed=7"]
        command += [part for setting in settings for part in ("--set", setting)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        output = self._process.stdout
        assert output
        self._output = output
        self.told = ""
        for line in output:
            self.told += line
            if line.startswith("try:"):
                break
        # The request log follows; a full pipe would stop the gateway.
        self._reader = threading.Thread(target=lambda: deque(output, maxlen=0))
        self._reader.start()
        base, admin = (
            re.search(rf"^{what}:\s+(http://[^/]+)/", self.told, re.M) for what in ("base URL", "admin")
        )
        assert base, self.told
        assert admin, self.told
        self.url, self.admin = base[1], admin[1]

    def endpoints(self) -> dict[str, dict[str, object]]:
        found = json.loads(get(f"{self.admin}/endpoints"))["endpoints"]
        return {endpoint["name"]: endpoint for endpoint in found}

    def stop(self) -> int:
        """The exit code after SIGTERM."""
        self._process.terminate()
        code = self._process.wait(60)
        self._reader.join()
        self._output.close()
        return code
