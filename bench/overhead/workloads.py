"""The workloads, as data: what is sent, to how many endpoints, and what is measured beside each router."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Workload:
    """One traffic pattern. Sizes in bytes of prompt; times in the unit of the name."""

    name: str
    title: str
    unit: str  # what CPU is divided by: request, chunk, stream (of max_tokens chunks) or second
    connections: int
    own: int  # bytes of the prompt that only this request has
    prefix: int = 0  # bytes shared by all requests of a group
    groups: int = 1
    max_tokens: int = 16
    stream: bool = False
    pace_us: int = 0  # between two chunks of a stream; 0: as fast as the router takes them
    think_us: int = 0
    stagger_us: int = 0
    warmup_s: float = 0.5
    duration_s: float = 2.0
    endpoints: int = 8
    beside: tuple[str, ...] = ("envoy",)  # measured next to every router, in the same round
    settings: dict[str, str] = field(default_factory=dict)  # Pointsman's --set
    peers: tuple[str, ...] = ()  # the only routers it makes sense for; empty: all
    scrapes_per_s: float = 0.0  # that the router must reach

    @property
    def flat_out(self) -> bool:
        """The router's core, or the client's, is the limit; otherwise a clock is."""
        return not self.pace_us and not self.think_us

    def loadgen_arguments(self, ports: list[int], seed: int, duration_s: float | None) -> list[str]:
        """Equal seeds send equal prompts; another seed shares no prefix with them."""
        values = {
            "ports": ",".join(map(str, ports)),
            "seed": seed,
            "connections": self.connections,
            "groups": self.groups,
            "prefix": self.prefix,
            "own": self.own,
            "max_tokens": self.max_tokens,
            "stream": int(self.stream),
            "pace_us": self.pace_us,
            "think_us": self.think_us,
            "stagger_us": self.stagger_us,
            "warmup_s": self.warmup_s,
            "duration_s": duration_s or self.duration_s,
        }
        return [f"{key}={value}" for key, value in values.items()]

    def expected_chunks_per_s(self) -> float | None:
        """Of a paced workload: what the mock sends when nothing holds it back."""
        return self.connections * 1e6 / self.pace_us if self.pace_us else None


LATENCY = ("direct", "envoy")
LONG_SHARED = {"groups": 4, "prefix": 380_000, "own": 20_000}
SHARED = {"groups": 8, "prefix": 26_000, "own": 6_000}

WORKLOADS = {
    w.name: w
    for w in (
        Workload("W1", "0.5 KB request, 32 connections flat out", "request", 32, own=370),
        Workload(
            "W2",
            "32 KB prompt, 26 KB of it shared in 8 groups, 32 connections flat out",
            "request",
            32,
            **SHARED,
        ),
        Workload(
            "W3",
            "32 KB prompt, streams of 200 chunks flat out, 32 connections",
            "chunk",
            32,
            max_tokens=200,
            stream=True,
            **SHARED,
        ),
        Workload(
            "W4",
            "256 concurrent streams at 50 chunks/s each, 0.5 KB request",
            "chunk",
            256,
            own=370,
            max_tokens=100,
            stream=True,
            pace_us=20_000,
            stagger_us=7_812,
            warmup_s=2.2,
            duration_s=3.0,
        ),
        Workload(
            "W5", "400 KB prompt (100K tokens), 380 KB of it shared in 4 groups", "request", 8, **LONG_SHARED
        ),
        Workload(
            "W5S",
            "400 KB prompt and 1,000 streamed chunks, 100 endpoints, 12 requests/s",
            "stream",
            48,
            max_tokens=1000,
            stream=True,
            pace_us=4_000,
            stagger_us=83_000,
            warmup_s=4.5,
            duration_s=6.0,
            endpoints=100,
            beside=("envoy", "relay"),
            **LONG_SHARED,
        ),
        Workload(
            "L1",
            "latency at low load: 0.5 KB request, 1 connection, 1 ms pause",
            "request",
            1,
            own=370,
            think_us=1000,
            warmup_s=0.3,
            duration_s=1.5,
            beside=LATENCY,
        ),
        Workload(
            "L2",
            "latency at low load: 32 KB prompt, 1 connection, 1 ms pause",
            "request",
            1,
            think_us=1000,
            warmup_s=0.3,
            duration_s=1.5,
            beside=LATENCY,
            **SHARED,
        ),
        Workload(
            "L4",
            "latency at low load: 4 streams, a chunk every 5 ms",
            "chunk",
            4,
            max_tokens=200,
            stream=True,
            pace_us=5_000,
            stagger_us=250_000,
            warmup_s=1.2,
            duration_s=2.0,
            beside=LATENCY,
            own=370,
        ),
        Workload(
            "SCRAPE",
            "100 endpoints with full-length vLLM metrics pages scraped at 20 Hz, 5 slow streams at each",
            "second",
            500,  # so that hardly an endpoint is idle, which would be scraped less often
            own=370,
            max_tokens=4,
            stream=True,
            pace_us=1_000_000,
            stagger_us=8_000,
            warmup_s=4.5,
            duration_s=4.0,
            endpoints=100,
            beside=(),
            settings={"metrics.interval_s": "0.05"},
            peers=("pointsman",),
            scrapes_per_s=2000,
        ),
    )
}
DEFAULT = ("W1", "W2", "W3", "W4", "W5", "L1")
