"""What the trace has of a request, what it never has, and what becomes of its file."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from xxhash import xxh3_64_intdigest, xxh64_intdigest

from pointsman.api import prompts
from pointsman.bench.workloads.recorded import Piece, read_recording
from pointsman.errors import SettingsError
from pointsman.observability.trace import BLOCK_BYTES, Header, Recorder, Ruled
from pointsman.observability.trace_file import BATCH_BYTES, TraceFile
from pointsman.testing import fleet, request
from pointsman.types import Decision, Ending, InferenceRequest, Outcome, Prediction, Usage

OK = Outcome(ending=Ending.OK, status=200, endpoint="e0", ttft_s=0.25, duration_s=1.25, decided_s=0.5)


def header() -> Header:
    return Header(unix_s=1_700_000_000.0, policy=Ruled(preset="least-cost"))


def asked(text: bytes, **fields: Any) -> InferenceRequest:
    one = prompts.prompt(text)
    return replace(request(), prompts=(one,), prompt_tokens=one.tokens, **fields)


def decided(one: InferenceRequest, at_s: float = 3.0) -> Decision:
    endpoints = fleet(2)
    return Decision(
        request_id=one.id,
        model=one.model,
        at_s=at_s,
        profile="default",
        candidates=endpoints,
        chosen=endpoints[0],
        matched_tokens=7,
        predicted=Prediction(0.1, 0.2, 0.03),
    )


class Traces:
    """A recorder and the lines it made."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.now_s = 1.0
        learned = {"prefill_tok_s": 5000.0}
        self.recorder = Recorder(
            self.lines.append, header, lambda: [(e, learned) for e in fleet(2)], lambda: self.now_s
        )
        self.recorder.begin()

    def tell(self, one: InferenceRequest, outcome: Outcome = OK) -> None:
        self.recorder(one, decided(one), outcome)

    def save(self, folder: Path) -> str:
        path = folder / "trace.jsonl"
        path.write_bytes(b"".join(self.lines))
        return str(path)


def test_a_line_has_what_happened_and_what_was_predicted(tmp_path: Path) -> None:
    traces = Traces()
    headers = {"x-llm-d-slo-ttft-ms": "500", "x-slo-tpot-ms": "nonsense"}
    one = asked(b"a" * 1000, model="m", stream=True, max_tokens=77, headers=headers, priority=-2)
    traces.tell(one, replace(OK, tries=2, usage=Usage(251, 40, 128), response_bytes=9000))
    recording = read_recording(traces.save(tmp_path))
    (line,) = recording.requests
    assert (line.model, line.endpoint, line.stream, line.ending) == ("m", "e0", True, "ok")
    assert line.at_s == 3.0 - 0.5 - 1.0, "arrival, from the file's beginning"
    assert (line.ttft_s, line.duration_s, line.tries) == (0.25, 1.25, 2)
    assert (line.prompt_tokens, line.told_prompt_tokens) == (250, 251)
    assert (line.output_tokens, line.cached_tokens, line.matched_tokens) == (40, 128, 7)
    assert (line.max_tokens, line.priority) == (77, -2)
    assert (line.slo_ttft_ms, line.slo_tpot_ms) == (500.0, None)
    assert line.predicted_ttft_s == pytest.approx(0.3)
    assert line.predicted_step_s == pytest.approx(0.03)
    assert recording.header.unix_s == 1_700_000_000.0
    assert [e.name for e in recording.fleets[0].endpoints] == ["e0", "e1"]
    assert recording.fleets[0].endpoints[0].learned == {"prefill_tok_s": 5000.0}


def test_refused_requests_are_counted_without_what_the_client_wrote(tmp_path: Path) -> None:
    traces = Traces()
    traces.tell(asked(b"x"))
    refused = Outcome(ending=Ending.REFUSED, status=404, reason="model_not_found")
    traces.recorder(asked(b"y", model="my secret diary"), None, refused)
    path = traces.save(tmp_path)
    assert read_recording(path).refused == 1
    assert b"diary" not in Path(path).read_bytes()


def prompt_of(pieces: tuple[Piece, ...]) -> list[tuple[int, int]]:
    """Whose block each block of a prompt is."""
    return [(owner, i) for owner, start, stop in pieces for i in range(start, stop)]


BLOCK = st.sampled_from([bytes([letter]) * BLOCK_BYTES for letter in b"abc"])
PROMPTS = st.lists(
    st.tuples(st.lists(BLOCK, max_size=6), st.binary(max_size=20), st.sampled_from(["m", "n"])),
    min_size=1,
    max_size=12,
)


@given(PROMPTS)
def test_prompts_share_in_the_trace_exactly_the_blocks_they_shared(
    tmp_path_factory: pytest.TempPathFactory, made: list[tuple[list[bytes], bytes, str]]
) -> None:
    traces = Traces()
    for blocks, rest, model in made:
        traces.tell(asked(b"".join(blocks) + rest, model=model))
    recording = read_recording(traces.save(tmp_path_factory.mktemp("t")))
    told = [prompt_of(recording.prefixes[i]) for i in range(len(made))]
    for (blocks, rest, model), mine in zip(made, told, strict=True):
        assert len(mine) == len(b"".join(blocks) + rest) // BLOCK_BYTES
        for (others, other_rest, other_model), theirs in zip(made, told, strict=True):
            one, two = b"".join(blocks) + rest, b"".join(others) + other_rest
            for i in range(min(len(mine), len(theirs))):
                same = model == other_model and one[: (i + 1) * BLOCK_BYTES] == two[: (i + 1) * BLOCK_BYTES]
                assert (mine[i] == theirs[i]) == same


@given(
    st.lists(st.binary(min_size=BLOCK_BYTES, max_size=5 * BLOCK_BYTES), min_size=1, max_size=5), st.binary()
)
def test_neither_text_nor_a_hash_of_it_is_in_the_file(texts: list[bytes], salt: bytes) -> None:
    traces = Traces()
    for text in texts:
        one = asked(text, model="m", root=salt, body=b'{"prompt": "' + text + b'"}')
        traces.tell(one)
        traces.tell(one)
    for line in traces.lines[2:]:
        fields = json.loads(line)
        strings = [field for field in fields if isinstance(field, str)]
        assert set(strings) <= {"r", "m", "e0", "ok"}
        numbers = [field for field in fields if isinstance(field, int)]
        assert max(numbers) < 2**31, "a hash is a larger number"
    content = b"".join(traces.lines)
    for text in texts:
        first = text[:BLOCK_BYTES]
        for digest in (xxh3_64_intdigest(first), xxh64_intdigest(first)):
            assert str(digest).encode() not in content
            assert f"{digest:x}".encode() not in content


def test_what_has_been_forgotten_is_new_again_and_what_is_used_is_not_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pointsman.observability.trace.GENERATION_BLOCKS", 20)
    traces = Traces()
    often, once = b"o" * BLOCK_BYTES * 5, b"x" * BLOCK_BYTES * 5
    traces.tell(asked(once))
    for i in range(20):
        traces.tell(asked(often))
        traces.tell(asked(bytes([i]) * BLOCK_BYTES * 5))
    traces.tell(asked(once))
    recording = read_recording(traces.save(tmp_path))
    new = [line.new for line in sorted(recording.requests, key=lambda line: line.number)]
    assert new[0] == new[-1] == 5
    assert sum(new[1:-1:2]) == 5, "the one that comes often is new once"
    assert all(n == 5 for n in new[2:-1:2])


async def run_file(file: TraceFile, write: Callable[[], None]) -> None:
    task = asyncio.create_task(file.run(lambda: None, 60.0))
    await asyncio.sleep(0)
    write()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_the_file_never_grows_over_its_bound_and_keeps_the_newest(tmp_path: Path) -> None:
    path, line = tmp_path / "trace", b"x" * 999 + b"\n"
    most = 1_000_000
    file = TraceFile(str(path), most)
    file.open(lambda: file.write(b"begin\n"))

    def write() -> None:
        for i in range(2900):
            file.write(b"%06d" % i + line[6:])

    await run_file(file, write)
    new, old = path.read_bytes(), path.with_name("trace.1").read_bytes()
    assert most / 2 < len(new) + len(old) <= most
    for content in (new, old):
        first, *lines = content.splitlines()
        assert first == b"begin"
        numbers = [int(line[:6]) for line in lines]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers))), "no line is lost"
    assert int(new.splitlines()[-1][:6]) == 2899
    assert int(new.splitlines()[1][:6]) == int(old.splitlines()[-1][:6]) + 1
    assert file.dropped == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
async def test_a_full_disk_is_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    file = TraceFile("/dev/full", 1 << 30)
    file.open(lambda: file.write(b"begin\n"))

    def write() -> None:
        for _ in range(5):
            file.write(b"x" * BATCH_BYTES)

    with caplog.at_level(logging.WARNING):
        await run_file(file, write)
    assert [r.getMessage() for r in caplog.records] == [
        "trace: /dev/full cannot be written, it ends here: No space left on device"
    ]


async def test_what_was_there_is_kept_as_the_file_before(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text("of the last run")
    file = TraceFile(str(path), 1 << 20)
    file.open(lambda: file.write(b"begin\n"))
    await run_file(file, lambda: None)
    assert path.read_text() == "begin\n"
    assert path.with_name("trace.1").read_text() == "of the last run"
    assert path.stat().st_mode & 0o077 == 0, "nobody else's business"


def test_a_place_that_cannot_be_written_is_said_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"trace\.path: .*: No such file or directory"):
        TraceFile(str(tmp_path / "none" / "trace"), 1 << 20).open(lambda: None)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda lines: [], "no trace of `pointsman serve`"),
        (lambda lines: [b'{"timestamp": 1}\n'], "no trace of `pointsman serve`"),
        (lambda lines: lines[:2], "no requests that an engine worked on"),
        (lambda lines: [*lines[:2], b"[1]\n", *lines[2:]], "line 3"),
        (lambda lines: [lines[0].replace(b",1]", b",99]"), *lines[1:]], "version 99"),
    ],
)
def test_a_file_that_is_no_trace_is_named(
    tmp_path: Path, change: Callable[[list[bytes]], list[bytes]], says: str
) -> None:
    traces = Traces()
    traces.tell(asked(b"x"))
    traces.lines = change(traces.lines)
    with pytest.raises(SettingsError, match=says):
        read_recording(traces.save(tmp_path))


def test_a_last_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    traces = Traces()
    traces.tell(asked(b"x"))
    traces.tell(asked(b"y"))
    traces.lines[-1] = traces.lines[-1][:20]
    assert len(read_recording(traces.save(tmp_path)).requests) == 1
