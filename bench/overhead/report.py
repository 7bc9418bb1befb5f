"""From raw runs to tables: paired ratios with the exact interval of their median."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .peers import PEERS
from .workloads import WORKLOADS, Workload

Record = dict[str, Any]  # one line of the JSONL file: the fields of measure.Run, and pair and round


@dataclass(frozen=True)
class Interval:
    """Where the median lies: two of the sorted values, and with what probability they enclose it."""

    low: float
    high: float
    confidence: float


def median_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The narrowest symmetric pair of order statistics that holds the median with ``confidence``.

    Exact for any distribution: the number of values under the median is binomial(n, 1/2). Of up to 5 values
    even the extremes give less than 95%; the interval is then those, and says what it does give.
    """
    ordered, n = sorted(values), len(values)

    def coverage(rank: int) -> float:  # of the rank-th smallest to the rank-th largest
        return 1 - 2 * sum(math.comb(n, k) for k in range(rank)) / 2**n

    rank = 1
    while rank + 1 <= n // 2 and coverage(rank + 1) >= confidence:
        rank += 1
    return Interval(ordered[rank - 1], ordered[n - rank], coverage(rank))


def usable(record: Record) -> bool:
    return not record["dropped"] and not record["faults"]


def rounds(records: Iterable[Record], workload: str) -> list[dict[str, Record]]:
    """Runs measured next to each other, by peer; only rounds in which every run is usable."""
    grouped: dict[str, dict[str, Record]] = {}
    for record in records:
        if record["workload"] == workload:
            grouped.setdefault(record["round"], {})[record["peer"]] = record
    return [runs for runs in grouped.values() if all(map(usable, runs.values()))]


def pairs(records: Iterable[Record], workload: str, peer: str, beside: str) -> list[tuple[Record, Record]]:
    """(peer, beside) of every usable round that measured both."""
    return [(r[peer], r[beside]) for r in rounds(records, workload) if peer in r and beside in r]


def spread(values: Sequence[float], digits: int = 1) -> str:
    """``median [min..max]``."""
    if not values:
        return "-"
    texts = [f"{v:.{digits}f}" for v in (statistics.median(values), min(values), max(values))]
    return texts[0] if len(values) == 1 else f"{texts[0]} [{texts[1]}..{texts[2]}]"


def with_interval(values: Sequence[float], digits: int = 2) -> str:
    """``median [low..high] (confidence)``."""
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.{digits}f} (1 pair)"
    interval = median_interval(values)
    median, low, high = (f"{v:.{digits}f}" for v in (statistics.median(values), interval.low, interval.high))
    return f"{median} [{low}..{high}] ({interval.confidence:.0%})"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def peers_of(records: Iterable[Record], workload: Workload) -> list[str]:
    """The routers measured in it, those beside them last."""
    names = dict.fromkeys(r["peer"] for r in records if r["workload"] == workload.name)
    return [n for n in names if n not in workload.beside] + [n for n in names if n in workload.beside]


def cpu_table(records: Sequence[Record], workload: Workload) -> list[str]:
    """CPU per unit, and the ratio to the Envoy run beside each."""
    every = rounds(records, workload.name)
    digits = {"chunk": 2, "request": 1}.get(workload.unit, 0)
    paced = workload.stream and not workload.flat_out
    rows = []
    for name in peers_of(records, workload):
        runs = [r[name] for r in every if name in r]
        compared = pairs(records, workload.name, name, "envoy")
        ratios = [a["cpu_us_per_unit"] / b["cpu_us_per_unit"] for a, b in compared if b["cpu_us_per_unit"]]

        def of(key: str, digits: int = 0, runs: Sequence[Record] = runs) -> str:
            return spread([r[key] for r in runs], digits)

        def client(series: str, quantile: str, runs: Sequence[Record] = runs) -> str:
            return spread([r["client"][series][quantile] for r in runs], 0)

        series = "event_delay_us" if paced else "latency_us"
        rows.append(
            [
                PEERS[name].title,
                str(len(runs)),
                of("cpu_us_per_unit", digits),
                {"envoy": "1", "direct": "-"}.get(name) or with_interval(ratios),
                of("units_per_s", 1 if workload.unit == "stream" else 0),
                of("router_cores", 2),
                of("client_cores", 2),
                client(series, "p50"),
                client(series, "p99"),
                of("rss_mb"),
                *([of("chunks_per_wakeup", 2)] if paced else []),
                *([of("chunks_per_read", 2)] if workload.stream else []),
            ]
        )
    delay = "chunk delay" if paced else "latency"
    head = [
        "router",
        "runs",
        f"CPU us/{workload.unit}",
        "ratio to Envoy",
        f"{workload.unit}s/s",
        "router cores",
        "client cores",
        f"{delay} p50 us",
        f"{delay} p99 us",
        "RSS MB",
        *(["chunks/wake-up"] if paced else []),
        *(["chunks/read"] if workload.stream else []),
    ]
    return [f"### {workload.name}: {workload.title}", "", *table(head, rows), ""]


def difference_table(
    records: Sequence[Record],
    workload: Workload,
    beside: str,
    heading: str,
    value: Callable[[Record, str], float],
) -> list[str]:
    """Paired differences to the run beside, at p50 and p99 or of CPU."""
    columns = {"p50": "p50 us", "p99": "p99 us"} if beside == "direct" else {"cpu": f"CPU us/{workload.unit}"}
    rows = []
    for name in peers_of(records, workload):
        compared = pairs(records, workload.name, name, beside)
        if name == beside or not compared:
            continue
        cells = [with_interval([value(a, c) - value(b, c) for a, b in compared], 0) for c in columns]
        rows.append([PEERS[name].title, str(len(compared)), *cells])
    if not rows:
        return []
    return [heading, "", *table(["router", "pairs", *columns.values()], rows), ""]


def added_latency(records: Sequence[Record], workload: Workload) -> list[str]:
    series = "event_delay_us" if workload.stream else "latency_us"
    return difference_table(
        records,
        workload,
        "direct",
        "Added to no router at all:",
        lambda r, quantile: r["client"][series][quantile],
    )


def beyond_bytes(records: Sequence[Record], workload: Workload) -> list[str]:
    return difference_table(
        records,
        workload,
        "relay",
        "Beyond moving the same bytes in Python:",
        lambda r, _: r["cpu_us_per_unit"],
    )


def scrape_table(records: Sequence[Record], workload: Workload) -> list[str]:
    rows = []
    for name in peers_of(records, workload):
        runs = [r[name] for r in rounds(records, workload.name) if name in r]
        per_scrape = [r["router_cores"] * 1e6 / r["scrapes_per_s"] for r in runs if r["scrapes_per_s"]]
        scrapes = spread([r["scrapes_per_s"] for r in runs], 0)
        cores = spread([r["router_cores"] for r in runs], 3)
        rows.append([PEERS[name].title, str(len(runs)), cores, scrapes, spread(per_scrape)])
    head = ["router", "runs", "cores in all", "scrapes/s", "CPU us/scrape"]
    return [f"### {workload.name}: {workload.title}", "", *table(head, rows), ""]


def left_out(records: Iterable[Record]) -> list[str]:
    """Every run that is in no table, and why."""
    lines = []
    for record in records:
        reasons = [*record["faults"], *([record["dropped"]] if record["dropped"] else [])]
        if reasons:
            lines.append(
                f"- {record['workload']} {record['peer']}, pair {record['pair']}: {'; '.join(reasons)}"
            )
    return [
        "Runs left out (with those beside them in the same round), and why:",
        "",
        *(lines or ["- none"]),
        "",
    ]


def markdown(machine: dict[str, str], records: Sequence[Record]) -> str:
    """The whole report."""
    lines = ["## Results", ""]
    lines += [f"- {key}: {value}" for key, value in machine.items()] + [""]
    for workload in WORKLOADS.values():
        if not any(r["workload"] == workload.name for r in records):
            continue
        if workload.unit == "second":
            lines += scrape_table(records, workload)
            continue
        lines += (
            cpu_table(records, workload) + added_latency(records, workload) + beyond_bytes(records, workload)
        )
    return "\n".join(lines + left_out(records))
