"""Which line of an engine's metrics page means what, and a reader that looks at those lines only.

A real vLLM page is 60 KB and 740 lines; we want a dozen. Pages of one engine hardly change their layout, so
each metric is first looked for where it was last time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from pointsman.types import Metrics

START_TIME = "process_start_time_seconds"
MAX_COUNT = 1e15
ABSENT_CHECK_EVERY = 32
"""A metric the page lacks is looked for again only this often: not finding it costs a walk of the page."""


class Spec(msgspec.Struct, frozen=True):
    """A metric, in llm-d's notation ``name{label=value}``: lines of that name that carry all the labels."""

    name: bytes
    labels: tuple[bytes, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Spec:
        name, _, labels = text.partition("{")
        pairs = [pair.partition("=") for pair in labels.rstrip("}").split(",") if pair]
        wanted = tuple(f'{key.strip()}="{value.strip().strip(chr(34))}"'.encode() for key, _, value in pairs)
        return cls(name.strip().encode(), wanted)


class EngineMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """One engine's names. ``recognise`` is a metric only this engine has."""

    engine: str
    recognise: str
    waiting: str
    running: str
    kv_usage: str = ""
    lora: str = ""
    """Carries labels max_lora, running_lora_adapters, waiting_lora_adapters; its value is a time stamp."""
    cache_info: str = ""
    """One line for each data-parallel rank; labels say block size, blocks and prefix caching."""
    rank_label: str = "engine"
    block_tokens_label: str = "block_size"
    kv_blocks_label: str = "num_gpu_blocks"
    prefix_caching_label: str = "enable_prefix_caching"
    block_tokens: str = ""
    kv_blocks: str = ""
    prefix_queries: str = ""
    prefix_hits: str = ""
    generation_tokens: str = ""
    preemptions: str = ""
    ttft: str = ""
    """A histogram of the time to first tokens."""
    ended: str = ""
    """Requests that have left it, all reasons together."""
    attributes: Mapping[str, str] = {}
    """Custom metrics: attribute key to spec."""


class PageReader:
    """Reads one endpoint's pages. Keeps where things were, so it belongs to one endpoint."""

    def __init__(self, engine: EngineMetrics) -> None:
        self.engine = engine
        self._specs: dict[str, Spec] = {}
        self._hints: dict[bytes, int] = {}
        self._absent: dict[bytes, int] = {}
        self._started = 0.0
        self._queries = 0.0
        self._static: dict[str, Any] = {}

    def read(self, page: bytes, now: float) -> tuple[Metrics, bool]:
        """The page's values, and whether the engine has restarted since the page before."""
        names = self.engine
        if not page.startswith(b"#"):
            page = b"\n" + page  # every line is looked for with the line break before it
        queries = self._sum(page, names.prefix_queries)
        started = self._sum(page, START_TIME)
        know_start = bool(started and self._started)
        restarted = started != self._started if know_start else queries < self._queries
        self._queries, self._started = queries, started or self._started
        if restarted or not self._static.get("kv_blocks"):
            self._static = self._cache_config(page)
        kv = list(self._values(page, names.kv_usage))
        return (
            Metrics(
                at_s=now,
                waiting=self._sum(page, names.waiting),
                running=self._sum(page, names.running),
                kv_usage=sum(kv) / len(kv) if kv else 0.0,
                prefix_queries=queries,
                prefix_hits=self._sum(page, names.prefix_hits),
                started_s=started,
                generation_tokens=self._sum(page, names.generation_tokens),
                preemptions=self._sum(page, names.preemptions),
                first_tokens=self._sum(page, names.ttft and names.ttft + "_count"),
                first_wait_s=self._sum(page, names.ttft and names.ttft + "_sum"),
                ended=self._sum(page, names.ended),
                attributes=self._attributes(page),
                **self._loras(page),
                **self._static,
            ),
            restarted,
        )

    def _sum(self, page: bytes, spec: str) -> float:
        return sum(self._values(page, spec))

    def _values(self, page: bytes, text: str) -> Iterator[float]:
        """The value of each matching line; NaN and infinity are no values."""
        for line in self._lines(page, text):
            try:
                value = float(line[line.rfind(b"}") + 1 :].split(None, 2)[0 if b"}" in line else 1])
            except (ValueError, IndexError):
                continue
            if math.isfinite(value):
                yield value

    def _attributes(self, page: bytes) -> dict[str, float]:
        """Custom metrics; those the page lacks are left out."""
        found = {key: list(self._values(page, spec)) for key, spec in self.engine.attributes.items()}
        return {key: sum(values) for key, values in found.items() if values}

    def _lines(self, page: bytes, text: str) -> Iterator[bytes]:
        if not text:
            return
        spec = self._specs.get(text) or self._specs.setdefault(text, Spec.parse(text))
        at = self._locate(page, b"\n" + spec.name)
        while at >= 0:
            end = page.find(b"\n", at + 1)
            line = page[at + 1 : end if end >= 0 else len(page)]
            if not line.startswith(spec.name) or line[len(spec.name) : len(spec.name) + 1] not in (
                b"{",
                b" ",
            ):
                return
            if all(label in line for label in spec.labels):
                yield line
            at = end

    def _locate(self, page: bytes, needle: bytes) -> int:
        """Offset of the newline before the first line of the metric, or -1."""
        at = self._hints.get(needle, 0)
        if page.startswith(needle, at) and page[at + len(needle) : at + len(needle) + 1] in (b"{", b" "):
            before = page.rfind(b"\n", 0, at)
            if before < 0 or not page.startswith(needle, before):
                return at
            # The page has moved by a line or more: what was the first line's place is now a later one's.
        missing = self._absent.get(needle, 0)
        if missing:
            self._absent[needle] = missing - 1
            return -1
        at = page.find(needle)
        while at >= 0 and page[at + len(needle) : at + len(needle) + 1] not in (b"{", b" "):
            at = page.find(needle, at + 1)
        if at < 0:
            self._absent[needle] = ABSENT_CHECK_EVERY
        else:
            self._hints[needle] = at
        return at

    def _cache_config(self, page: bytes) -> dict[str, Any]:
        """What an engine says once: block size, KV size, prefix caching. Looked at until it has said it."""
        names = self.engine
        found: dict[str, Any] = {}
        blocks: dict[str, int] = {}
        for line in self._lines(page, names.cache_info):
            labels = _labels(line)
            if block_tokens := _count(labels.get(names.block_tokens_label, "")):
                found["block_tokens"] = block_tokens
            if kv_blocks := _count(labels.get(names.kv_blocks_label, "")):
                blocks[labels.get(names.rank_label, "")] = kv_blocks
            if names.prefix_caching_label in labels:
                found["prefix_caching"] = labels[names.prefix_caching_label] == "True"
        if blocks:
            found["kv_blocks"] = sum(blocks.values())
        for field, spec in (("block_tokens", names.block_tokens), ("kv_blocks", names.kv_blocks)):
            value = self._sum(page, spec)
            if 0 < value < MAX_COUNT:
                found[field] = int(value)
        return found

    def _loras(self, page: bytes) -> dict[str, Any]:
        """The adapters of the newest series: old label sets stay on the page, the value is a time stamp."""
        newest, at = b"", 0.0
        for line in self._lines(page, self.engine.lora):
            try:
                stamp = float(line.rsplit(b" ", 1)[-1])
            except ValueError:
                continue
            if stamp >= at:
                newest, at = line, stamp
        if not newest:
            return {}
        labels = _labels(newest)

        def names(label: str) -> frozenset[str]:
            return frozenset(filter(None, (n.strip() for n in labels.get(label, "").split(","))))

        return {
            "loras_active": names("running_lora_adapters"),
            "loras_waiting": names("waiting_lora_adapters"),
            "max_loras": _count(labels.get("max_lora", "")),
        }


_LABEL = re.compile(rb'(\w+)="((?:[^"\\]|\\.)*)"')


def _labels(line: bytes) -> dict[str, str]:
    return {k.decode(): v.decode(errors="replace") for k, v in _LABEL.findall(line)}


_NAME = re.compile(rb"^([\w:]+)[{ ]", re.MULTILINE)


def _count(text: str) -> int:
    """A label's number; 0 where it is none, such as None."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 15 else 0


def recognise(page: bytes, engines: Sequence[EngineMetrics]) -> EngineMetrics | None:
    """The first of ``engines`` whose page this can be."""
    names = set(_NAME.findall(page))
    return next((e for e in engines if e.recognise.encode() in names), None)
