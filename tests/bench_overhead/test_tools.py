"""The mock servers and the load generator against each other, and the checks that void a run."""

import dataclasses
import http.client
import json
import os
import shutil
import socket
import subprocess
import time

import pytest
from bench.overhead import measure, peers, setup
from bench.overhead.workloads import WORKLOADS

needs_gcc = pytest.mark.skipif(
    not (shutil.which("gcc") and shutil.which("taskset")), reason="the tools are C and are pinned to cores"
)
SHORT = {"warmup_s": 0.1, "duration_s": 0.3, "stagger_us": 0}


@pytest.fixture(scope="module")
def tools():
    setup.build_tools()


@pytest.fixture
def mock(tools, monkeypatch):
    monkeypatch.setattr(peers, "CLIENT_CORE", first_core())
    monkeypatch.setattr(measure, "CLIENT_CORE", first_core())
    with peers.mock_fleet(4) as running:
        yield running


def first_core():
    return str(min(os.sched_getaffinity(0)))


def direct(mock):
    return peers.Running("direct", mock.ports, None)


def short(name, **changes):
    return dataclasses.replace(WORKLOADS[name], endpoints=4, connections=4, **(SHORT | changes))


@needs_gcc
@pytest.mark.parametrize("name", ["W1", "W2", "W3", "W5"])
def test_every_answer_is_whole_and_accounted_for(mock, name):
    run = measure.run(short(name), peers.PEERS["direct"], direct(mock), mock, 1, None, foreign_limit=8.0)

    assert run.faults == []
    assert run.client["answered"] == run.client["issued"] > 4
    assert run.endpoints_used == 4
    if WORKLOADS[name].stream:
        whole = (
            run.client["done"] - 4
        )  # of the first answer of each connection, part may lie before the window
        assert run.client["events"] >= whole * WORKLOADS[name].max_tokens > 0


@needs_gcc
def test_paced_stream_comes_at_its_pace(mock):
    workload = short("W4", pace_us=10_000, max_tokens=20, warmup_s=0.3, duration_s=0.6)

    run = measure.run(workload, peers.PEERS["direct"], direct(mock), mock, 1, None, foreign_limit=8.0)

    assert 300 < run.units_per_s <= workload.expected_chunks_per_s() * 1.1


@needs_gcc
def test_equal_seeds_send_equal_prompts(tools):
    """What reaches a server of our own, which hangs up after the first request."""

    def first_request(seed):
        with socket.create_server(("127.0.0.1", 0)) as server:
            arguments = short("W1").loadgen_arguments([server.getsockname()[1]], seed, None)
            one = [a for a in arguments if not a.startswith("connections")]
            with subprocess.Popen(
                [setup.LOADGEN, *one], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            ) as loadgen:
                with server.accept()[0] as connection, connection.makefile("rb") as stream:
                    while (line := stream.readline()) != b"\r\n":
                        if line.startswith(b"Content-Length"):
                            size = int(line.split()[1])
                    body = stream.read(size)
                loadgen.kill()
        return json.loads(body)["messages"][1]["content"]

    assert first_request(1) == first_request(1) != first_request(2)


@needs_gcc
def test_run_with_foreign_load_is_dropped_whatever_it_shows(mock):
    run = measure.run(short("W1"), peers.PEERS["direct"], direct(mock), mock, 1, None, foreign_limit=-1.0)

    assert run.dropped.startswith("foreign load")
    assert run.faults == []


@needs_gcc
def test_mock_answers_render_with_404_and_counts_it_apart(mock):
    connection = http.client.HTTPConnection("127.0.0.1", mock.ports[1], timeout=5)
    connection.request("POST", "/v1/chat/completions/render", b'{"messages":[]}')

    assert connection.getresponse().status == 404
    connection.close()
    assert [(e["renders"], e["generations"]) for e in measure.counters(mock)] == [
        (0, 0),
        (1, 0),
        (0, 0),
        (0, 0),
    ]


@needs_gcc
def test_mock_understands_a_chunked_request_in_pieces(mock):
    body = json.dumps(
        {"messages": [{"role": "user", "content": "hi " * 5000}], "stream": True, "max_tokens": 3}
    ).encode()
    connection = http.client.HTTPConnection("127.0.0.1", mock.ports[0], timeout=5)
    pieces = (body[i : i + 700] for i in range(0, len(body), 700))
    connection.request("POST", "/v1/chat/completions", pieces, encode_chunked=True)

    text = connection.getresponse().read().decode()

    connection.close()
    assert text.count('"delta"') == 3
    assert text.endswith("data: [DONE]\n\n")


@needs_gcc
def test_metrics_page_is_whole_and_says_what_runs(mock):
    stream = http.client.HTTPConnection("127.0.0.1", mock.ports[0], timeout=5)
    stream.request("POST", "/v1/chat/completions", b'{"stream":true,"max_tokens":2,"pace_us":60000000}')
    stream.getresponse()
    scrape = http.client.HTTPConnection("127.0.0.1", mock.ports[0], timeout=5)
    scrape.request("GET", "/metrics")

    page = scrape.getresponse().read().decode()

    scrape.close()
    stream.close()
    assert 'vllm:num_requests_running{engine="0",model_name="tiny"} 1.0\n' in page
    assert len(page.splitlines()) == len(setup.METRICS_PAGE.read_text().splitlines())


def asked(generations, renders=0):
    return [
        {"generations": g, "renders": renders, "other_posts": 0, "scrapes": 0, "running": 0}
        for g in generations
    ]


def client(**changes):
    account = {"issued": 8, "unfinished": 0, "bad_status": 0, "incomplete": 0, "closed": 0, "altered": 0}
    return account | {"events": 0, "elapsed_s": 1.0} | changes


@pytest.mark.parametrize(
    ("account", "after", "peer", "fault"),
    [
        (client(bad_status=2), asked([2, 2, 2, 2]), "envoy", "2 answers bad_status"),
        (client(incomplete=1), asked([2, 2, 2, 2]), "envoy", "1 answers incomplete"),
        (client(altered=1), asked([2, 2, 2, 2]), "pointsman", "1 answers altered"),
        (client(altered=1), asked([2, 2, 2, 2]), "smg", None),
        (client(), asked([4, 4, 4, 4]), "envoy", "8 requests made 16 generations"),
        (client(), asked([2, 2, 2, 1]), "envoy", "8 requests made 7 generations"),
        (client(unfinished=1), asked([2, 2, 2, 1]), "envoy", None),
        (client(), asked([2, 2, 2, 2], renders=2), "vllm-router", "8 POSTs besides the requests"),
        (client(), asked([4, 4, 0, 0]), "envoy", "only 2 of 4 endpoints got requests"),
        (client(), asked([8, 0, 0, 0]), "pointsman", "only 1 of 4 endpoints got requests"),
        (client(), asked([4, 4, 0, 0]), "pointsman", None),
    ],
)
def test_what_voids_a_run(account, after, peer, fault):
    result = measure.Run(
        "W1", peer, 50.0, 8.0, 8.0, 0.5, 0.5, 0.0, 50.0, 0.0, 0.0, 0.0,
        endpoints_used=sum(e["generations"] > 0 for e in after), client=account,
    )  # fmt: skip

    found = measure.faults(short("W1"), peers.PEERS[peer], result, asked([0, 0, 0, 0]), after)

    assert found == ([fault] if fault else [])


def test_slow_pace_voids_a_run():
    result = measure.Run(
        "W4", "envoy", 50.0, 8.0, 8.0, 0.5, 0.5, 0.0, 50.0, 0.0, 0.0, 0.0,
        endpoints_used=4, client=client(events=180),
    )  # fmt: skip

    found = measure.faults(short("W4"), peers.PEERS["envoy"], result, asked([0] * 4), asked([2] * 4))

    assert found == ["180 of 200 chunks/s"]


def test_cpu_clock_counts_what_another_process_burns():
    with subprocess.Popen(["sh", "-c", "while :; do :; done"]) as busy:
        try:
            deadline = time.monotonic() + 20
            while measure.cpu_s([busy.pid]) < 0.05:
                assert time.monotonic() < deadline
            assert 0.05 <= measure.cpu_s([busy.pid]) < 20
        finally:
            busy.kill()


def test_process_tree_holds_children():
    script = "sh -c 'echo $$; read line; :'; :"
    with subprocess.Popen(
        ["sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as shell:
        child = int(shell.stdout.readline())
        tree = measure.process_tree(shell.pid)
        shell.stdin.close()

    assert tree == [shell.pid, child]


def test_free_ports_are_different():
    assert len(set(peers.free_ports(10))) == 10
