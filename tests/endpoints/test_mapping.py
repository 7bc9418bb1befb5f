"""What is read from the metrics page of each engine."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman.endpoints.metrics.mapping import EngineMetrics, PageReader, recognise
from pointsman.endpoints.metrics.source import engines
from pointsman.types import Metrics

Page = Callable[[str], bytes]
BY_NAME = {engine.engine: engine for engine in engines()}
FILES = {
    "vllm": "vllm-0.32.0",
    "sglang": "sglang",
    "trtllm-serve": "trtllm-serve",
    "triton-tensorrt-llm": "triton-tensorrt-llm",
    "triton": "triton",
    "llama.cpp": "llamacpp",
}


def read(engine: str, page: bytes | str) -> Metrics:
    text = page.encode() if isinstance(page, str) else page
    return PageReader(BY_NAME[engine]).read(text, 5.0)[0]


def test_every_engine_has_a_page_here() -> None:
    assert set(FILES) == set(BY_NAME)


@pytest.mark.parametrize("engine", FILES)
def test_each_page_is_recognised_as_its_own_engines(engine: str, page: Page) -> None:
    found = recognise(page(FILES[engine]), engines())
    assert found
    assert found.engine == engine


def test_a_strangers_page_is_nobodys() -> None:
    assert recognise(b"# HELP up x\nup 1\nvllm:num_requests_running_total 3\n", engines()) is None
    assert recognise(b"", engines()) is None


def test_a_real_vllm_page(page: Page) -> None:
    text = page("vllm-0.32.0").decode()
    metrics = read("vllm", text)
    assert (metrics.waiting, metrics.running, metrics.kv_usage) == (0.0, 0.0, 0.0)
    assert (metrics.prefix_queries, metrics.prefix_hits) == (769.0, 224.0)
    assert (metrics.block_tokens, metrics.prefix_caching) == (32, True)
    (blocks,) = re.findall(r'num_gpu_blocks="(\d+)"', text)
    assert metrics.kv_blocks == int(blocks) > 0
    busy = re.sub(r"(?m)^(vllm:num_requests_running\{.*\}) .*", r"\1 3.0", text)
    busy = re.sub(r"(?m)^(vllm:num_requests_waiting\{.*\}) .*", r"\1 2.0", busy)
    busy = re.sub(r"(?m)^(vllm:kv_cache_usage_perc\{.*\}) .*", r"\1 0.25", busy)
    metrics = read("vllm", busy)
    assert (metrics.waiting, metrics.running, metrics.kv_usage) == (2.0, 3.0, 0.25)


@pytest.mark.parametrize(
    ("engine", "kv_usage", "block_tokens", "kv_blocks", "queries", "hits"),
    [
        ("sglang", 0.25, 64, 5000, 1000, 400),
        ("trtllm-serve", 0.25, 32, 5000, 0, 0),
        ("triton-tensorrt-llm", 0.25, 64, 5000, 0, 0),
        ("triton", 0.0, 0, 0, 0, 0),
        ("llama.cpp", 0.25, 0, 0, 0, 0),
    ],
)
def test_the_other_engines(
    engine: str, kv_usage: float, block_tokens: int, kv_blocks: int, queries: float, hits: float, page: Page
) -> None:
    metrics = read(engine, page(FILES[engine]))
    assert (metrics.waiting, metrics.running) == (2.0, 3.0)
    assert metrics.kv_usage == kv_usage
    assert (metrics.block_tokens, metrics.kv_blocks) == (block_tokens, kv_blocks)
    assert (metrics.prefix_queries, metrics.prefix_hits) == (queries, hits)
    assert metrics.at_s == 5.0


def test_data_parallel_ranks_are_summed_and_their_kv_usage_averaged() -> None:
    metrics = read(
        "vllm",
        "# TYPE vllm:num_requests_running gauge\n"
        'vllm:num_requests_running{engine="0"} 3.0\nvllm:num_requests_running{engine="1"} 4.0\n'
        'vllm:num_requests_waiting{engine="0"} 1.0\nvllm:num_requests_waiting{engine="1"} 5.0\n'
        'vllm:kv_cache_usage_perc{engine="0"} 0.2\nvllm:kv_cache_usage_perc{engine="1"} 0.6\n'
        'vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="100"} 1\n'
        'vllm:cache_config_info{block_size="16",engine="1",num_gpu_blocks="90"} 1\n',
    )
    assert (metrics.running, metrics.waiting) == (7.0, 6.0)
    assert metrics.kv_usage == pytest.approx(0.4)
    assert (metrics.block_tokens, metrics.kv_blocks) == (16, 190)


def test_a_metric_whose_name_begins_like_another_is_not_taken_for_it() -> None:
    page = (
        "# HELP vllm:num_requests_waiting_by_reason x\n"
        'vllm:num_requests_waiting_by_reason{reason="capacity"} 9.0\n'
        "vllm:num_requests_waiting_total 8.0\n"
        'vllm:num_requests_waiting{engine="0"} 2.0\n'
        "vllm:num_requests_waiting_by_reason 7.0\n"
    )
    reader = PageReader(BY_NAME["vllm"])
    assert [reader.read(page.encode(), 0.0)[0].waiting for _ in range(2)] == [2.0, 2.0]


def test_help_and_type_lines_are_no_values() -> None:
    head = "# HELP vllm:num_requests_running 5\n# TYPE vllm:num_requests_running gauge\n"
    page = head + "vllm:num_requests_running 1\n"
    assert read("vllm", page).running == 1.0


def test_a_page_may_begin_with_a_value_and_end_without_a_line_break() -> None:
    assert read("vllm", "vllm:num_requests_running 2\nvllm:num_requests_waiting 3").running == 2.0
    assert read("vllm", "vllm:num_requests_running 2\nvllm:num_requests_waiting 3").waiting == 3.0


def test_time_stamps_after_a_value_are_not_the_value() -> None:
    assert read("vllm", 'vllm:num_requests_running{a="}"} 2 1700000000\n').running == 2.0
    assert read("vllm", "vllm:num_requests_running 2 1700000000\n").running == 2.0


def test_missing_metrics_and_values_that_are_none_count_as_zero() -> None:
    for value in ("NaN", "+Inf", "-Inf", "", "abc"):
        metrics = read("vllm", f"vllm:num_requests_running {value}\nvllm:kv_cache_usage_perc {value}\n")
        assert (metrics.running, metrics.kv_usage, metrics.kv_blocks) == (0.0, 0.0, 0)
    assert read("vllm", 'vllm:cache_config_info{block_size="None",num_gpu_blocks="None"} 1\n').kv_blocks == 0


def test_a_metric_that_appears_later_is_found_after_a_while() -> None:
    reader = PageReader(BY_NAME["vllm"])
    bare = b"vllm:num_requests_running 1\n"
    assert reader.read(bare, 0.0)[0].loras_active == frozenset()
    later = bare + b'vllm:lora_requests_info{max_lora="2",running_lora_adapters="x"} 1.0\n'
    assert any(reader.read(later, 0.0)[0].loras_active == {"x"} for _ in range(50))


def test_the_newest_adapter_series_counts_wherever_it_stands() -> None:
    def line(running: str, waiting: str, stamp: str) -> str:
        return (
            f'vllm:lora_requests_info{{max_lora="2",running_lora_adapters="{running}",'
            f'waiting_lora_adapters="{waiting}"}} {stamp}\n'
        )

    old, new = line("old", "", "1.79e+09"), line("a, b", "c", "1.80e+09")
    for page in (old + new, new + old):
        metrics = read("vllm", page)
        assert (metrics.loras_active, metrics.loras_waiting) == ({"a", "b"}, {"c"})
        assert metrics.max_loras == 2
    assert read("vllm", line("", "", "1.9e9") + old).loras_active == frozenset()


class TestLayout:
    """A reader looks first where a metric was last time; that must never show."""

    def test_lines_that_come_and_go_before_it(self) -> None:
        reader = PageReader(BY_NAME["vllm"])
        ranks = "".join(f'vllm:num_requests_running{{engine="{i}"}} {i + 1}.0\n' for i in range(3))
        filler = 'vllm:some_thing_as_long{name="x"} 100.000\n'
        assert len(filler) == len(ranks) // 3
        for fillers in (3, 2, 1, 0, 2, 4, 3):
            page = "# a page\n" + filler * fillers + ranks
            assert reader.read(page.encode(), 0.0)[0].running == 6.0

    @given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 60), st.floats(0, 1e6)), max_size=6))
    def test_whatever_pages_came_before(self, pages: list[tuple[int, int, float]]) -> None:
        reader = PageReader(BY_NAME["sglang"])
        for lines, width, value in pages:
            text = (
                f"{'x' * width} 1\n" * lines + f"sglang:num_running_reqs {value!r}\nsglang:num_queue_reqs 1\n"
            )
            assert reader.read(text.encode(), 0.0)[0].running == value


class TestRestarts:
    def reader(self) -> Callable[[str], bool]:
        reader = PageReader(BY_NAME["vllm"])
        return lambda page: reader.read(page.encode(), 0.0)[1]

    def test_by_the_start_time(self) -> None:
        restarted = self.reader()
        pages = [
            f"process_start_time_seconds {at}\nvllm:prefix_cache_queries_total 5\n" for at in (7, 7, 8, 8)
        ]
        assert [restarted(page) for page in pages] == [False, False, True, False]

    def test_by_counters_that_go_back(self) -> None:
        restarted = self.reader()
        pages = [f"vllm:prefix_cache_queries_total {n}\n" for n in (5, 9, 9, 2, 3)]
        assert [restarted(page) for page in pages] == [False, False, False, True, False]

    def test_a_start_time_that_is_first_seen_later_is_no_restart(self) -> None:
        restarted = self.reader()
        first = "vllm:prefix_cache_queries_total 5\n"
        assert not any(restarted(first) for _ in range(2))
        assert not any(restarted("process_start_time_seconds 7\n" + first) for _ in range(40))

    def test_what_the_engine_says_once_is_read_again_after_one(self) -> None:
        reader = PageReader(BY_NAME["vllm"])

        def blocks(start: int, blocks: int) -> int:
            page = (
                f"process_start_time_seconds {start}\n"
                f'vllm:cache_config_info{{block_size="16",num_gpu_blocks="{blocks}"}} 1.0\n'
            )
            return reader.read(page.encode(), 0.0)[0].kv_blocks

        assert [blocks(1, 100), blocks(1, 100), blocks(2, 300)] == [100, 100, 300]


class TestCustomMetrics:
    ENGINE = EngineMetrics(
        engine="x", recognise="up", waiting="", running="", attributes={"a": "up", "temp": "t{gpu=1}"}
    )

    def test_they_become_attributes_those_missing_are_left_out(self) -> None:
        reader = PageReader(self.ENGINE)
        assert reader.read(b"up 1\n", 0.0)[0].attributes == {"a": 1.0}
        full = b'up 1\nt{gpu="0"} 5\nt{gpu="1"} 0\n'
        assert PageReader(self.ENGINE).read(full, 0.0)[0].attributes == {"a": 1.0, "temp": 0.0}


@pytest.mark.parametrize("engine", FILES)
@given(data=st.data())
def test_garbage_never_raises(engine: str, data: st.DataObject) -> None:
    specs = [
        v
        for v in (getattr(BY_NAME[engine], f) for f in EngineMetrics.__struct_fields__)
        if isinstance(v, str)
    ]
    names = [spec.partition("{")[0].encode() for spec in specs if spec]
    junk = st.one_of(
        st.binary(max_size=20), st.sampled_from([b'{max_lora="\xb2"}', b'{block_size="9"}', b" 1e999", b"{"])
    )
    line = st.tuples(st.sampled_from(names), junk, junk).map(b"".join)
    pages = data.draw(st.lists(st.lists(line).map(b"\n".join), min_size=1, max_size=3))
    reader = PageReader(BY_NAME[engine])
    for text in pages:
        recognise(text, engines())
        metrics, _ = reader.read(text, 1.0)
        assert metrics.kv_blocks >= 0
        assert metrics.running == metrics.running, "never NaN"
