"""``pointsman bench`` as a user runs it."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from pointsman.cli.main import main

pytestmark = pytest.mark.usefixtures("no_stray_loop")


class _Model(BaseHTTPRequestHandler):
    """Streams ``max_tokens`` tokens; models whose name is ``full`` get 503."""

    protocol_version = "HTTP/1.1"
    keys: ClassVar[list[str]] = []

    def do_GET(self):
        self._send(200, b'{"data":[{"id":"tiny"}]}')

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.keys.append(self.headers["authorization"])
        if body["model"] == "full":
            return self._send(503, b'{"error":{"message":"come back later"}}')
        tokens = body["max_tokens"]
        usage = {
            "prompt_tokens": 100,
            "completion_tokens": tokens,
            "prompt_tokens_details": {"cached_tokens": 75},
        }
        events = [{"choices": [{"text": " a"}]}] * tokens + [{"choices": [], "usage": usage}]
        data = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
        return self._send(200, data.encode())

    def _send(self, status, data):
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.send_header("x-pointsman-endpoint", "only-one")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def url():
    with ThreadingHTTPServer(("127.0.0.1", 0), _Model) as server:
        server.daemon_threads = True
        _Model.keys = []
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def bench(*args):
    with pytest.raises(SystemExit) as left:
        main(["bench", *args])
    return left.value.code


SMALL = ("--groups", "2", "--system-prompt-len", "10", "--question-len", "5", "--output-len", "4")


def test_a_ladder_prints_a_table_and_writes_json_and_a_plot(url, tmp_path, capsys):
    out = str(tmp_path / "out.json"), str(tmp_path / "out.svg")
    rates = ("--rate", "100:0.1,200:0.1", "--slo-ttft", "5")
    assert bench(url, *SMALL, *rates, "--json", out[0], "--plot", out[1], "--api-key", "secret") == 0
    told = capsys.readouterr()
    rows = [line.split("  ")[0] for line in told.out.split("\n")]
    assert rows[1:3] == ["rate 100", "rate 200"]
    assert "answered by only-one 100.0%" in told.out
    written = json.loads((tmp_path / "out.json").read_text())
    assert [stage["requests"] for stage in written["stages"]] == [10, 20]
    assert [stage["prefix_hit_rate"] for stage in written["stages"]] == [0.75, 0.75]
    assert [stage["output_tokens"] for stage in written["stages"]] == [40, 80]
    assert written["stages"][0]["within_slo"] == 1.0
    assert "secret" not in (tmp_path / "out.json").read_text()
    assert _Model.keys == ["Bearer secret"] * 30
    assert (tmp_path / "out.svg").read_text().startswith("<?xml")


def test_the_key_may_come_from_the_environment_and_json_go_to_stdout(url, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "from-env")
    assert bench(url, *SMALL, "--concurrency", "2", "--requests", "6", "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["stages"][0]["load"] == "concurrency 2"
    assert _Model.keys == ["Bearer from-env"] * 6


def test_a_trace_is_replayed(url, tmp_path, capsys):
    rows = [
        {"timestamp": at, "input_length": 600, "output_length": 3, "hash_ids": [1, at]} for at in (0, 40, 80)
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert bench(url, "--workload", "trace", "--trace", str(tmp_path / "t.jsonl"), "--json", "-") == 0
    (stage,) = json.loads(capsys.readouterr().out)["stages"]
    assert (stage["requests"], stage["output_tokens"]) == (3, 9)


def test_when_everything_fails_the_exit_code_and_the_table_say_so(url, capsys):
    assert bench(url, *SMALL, "--model", "full", "--concurrency", "1", "--requests", "3") == 1
    assert "3 x status 503: " in capsys.readouterr().out


MISTAKES = {
    "no load": ((), "--rate or --concurrency"),
    "two loads": (("--rate", "1", "--concurrency", "1"), "--rate or --concurrency"),
    "no number": (("--rate", "fast"), "--rate: fast"),
    "no seconds": (("--rate", "1:x"), "--rate: 1:x"),
    "half a request": (("--concurrency", "1.5"), "--concurrency: 1.5"),
    "nothing": (("--rate", "0"), "--rate: 0"),
    "speed": (("--rate", "1", "--speed", "0"), "--speed"),
    "no requests": (("--rate", "1", "--requests", "0"), "--requests"),
    "no groups": (("--rate", "1", "--groups", "0"), "groups"),
    "no trace": (("--workload", "trace"), "--trace"),
    "trace with a rate": (("--workload", "trace", "--trace", "x", "--rate", "1"), "--rate"),
    "lost trace": (("--workload", "trace", "--trace", "/nowhere/x"), "/nowhere/x: No such file"),
    "plot kind": (("--rate", "1", "--plot", "a.gif"), "--plot: a.gif"),
    "header": (("--rate", "1", "--header", "nocolon"), "--header: nocolon"),
    "extra": (("--rate", "1", "--extra-body", "[1]"), "--extra-body"),
    "nobody there": (("--rate", "1"), "cannot connect to 127.0.0.1:1"),
    "files": (("--concurrency", "100000000"), "open files"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(mistake, capsys):
    args, says = MISTAKES[mistake]
    assert bench("http://127.0.0.1:1", *args) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert says in told.err
    assert len(told.err.strip().split("\n")) == 1


@pytest.mark.parametrize("url", ["ftp://x", "localhost:8000", "http://u:p@h"])
def test_a_url_that_cannot_be_is_one_line(url, capsys):
    assert bench(url, "--rate", "1") == 2
    assert len(capsys.readouterr().err.strip().split("\n")) == 1
