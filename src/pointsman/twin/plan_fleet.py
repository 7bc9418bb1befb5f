"""The fleet of a trace as simulated engines, as fast as was learned of each; and changes to it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median

import msgspec
from msgspec import structs

from pointsman.bench.workloads.recorded import Recording
from pointsman.errors import SettingsError
from pointsman.observability.trace import Known
from pointsman.predictor.learned import Learned
from pointsman.registry import hint
from pointsman.sim.profiles import ACCELERATORS, MODELS, EngineParameters
from pointsman.sim.spec import FleetItem

KIND_LABELS = ("accelerator", "kind", "gpu", "nvidia.com/gpu.product", "amd.com/gpu.product-name")
"""Labels that say what an endpoint is, the first that is there."""
PRICE_LABEL = "price"
KV_TOLERANCE = 0.03
"""Endpoints without such a label are alike when their engines are and their KV caches differ by no more."""
UNTOLD_KV_TOKENS = 1_000_000
"""Of an engine that does not publish the size of its KV cache: enough, so that it never is what limits."""
UNTOLD_BLOCK_TOKENS = 16
MAX_SEQUENCES = 1024
"""vLLM's default on large cards; engines do not publish theirs."""
FEW_TOKENS = 200
"""A prompt with so few uncached tokens shows what beginning a prefill costs."""
MANY_TOKENS = 500
"""Fewer say more of steps than of prefill."""
STEPS_BEFORE_TOKEN = 1.5
"""A request waits for half of the step under way on average, and for its own."""
ENOUGH = 5
PASSES = 3
"""Each of the two costs of a prefill is found by what is known of the other; that settles at once."""
MOST_TIMES = 3.0
"""What requests met changes a learned speed by no more."""
LEAST_EVIDENCE_S = 30.0
"""Less than that is hardly more than the first guess."""


class Fleet(msgspec.Struct, frozen=True):
    """Engines to simulate, one an item; ``accelerator`` is the kind."""

    items: tuple[FleetItem, ...]

    @property
    def counts(self) -> Mapping[str, int]:
        """Endpoints of each kind."""
        return Counter(item.accelerator for item in self.items)

    def price(self, prices: Mapping[str, float]) -> float | None:
        """Of an hour; None where that of a kind is not known."""
        counts = self.counts
        if not all(kind in prices for kind in counts):
            return None
        return sum(n * prices[kind] for kind, n in counts.items())

    @property
    def told(self) -> str:
        """``4 h100-nvl, 8 mi325x``."""
        return ", ".join(f"{n} {kind}" for kind, n in self.counts.items())


class Kinds:
    """What can be added: like the endpoints of the trace, else as the simulator knows it."""

    def __init__(
        self, recorded: Fleet, models: Sequence[str] = (), max_num_seqs: Mapping[str, int] | None = None
    ) -> None:
        self._models = tuple(models)
        self._max_num_seqs = max_num_seqs or {}
        self.learned: dict[str, FleetItem] = {}
        for kind in recorded.counts:
            alike = [item for item in recorded.items if item.accelerator == kind]
            self.learned[kind] = structs.replace(alike[0], name="", measured=_middle(alike))

    def find(self, kind: str) -> FleetItem:
        """One of that kind, without a name; ``SettingsError`` when nothing is known of it."""
        found = self.learned.get(kind)
        if found is None and kind in ACCELERATORS:
            found = FleetItem(accelerator=kind, model=self._models or MODELS[0])
        if found is not None:
            return self._limited(found)
        known = tuple(dict.fromkeys([*self.learned, *ACCELERATORS]))
        raise SettingsError(
            f"{kind!r} is no kind of endpoint{hint(kind, known)}; there are {', '.join(known)}"
        )

    def limited(self, fleet: Fleet) -> Fleet:
        """With batches no larger than was said."""
        return Fleet(tuple(map(self._limited, fleet.items)))

    def _limited(self, item: FleetItem) -> FleetItem:
        return structs.replace(item, max_num_seqs=self._max_num_seqs.get(item.accelerator, item.max_num_seqs))

    def guessed(self, kind: str) -> bool:
        """Its speed is not from the trace."""
        return kind not in self.learned


def prices_of(recording: Recording, fleet: Fleet) -> dict[str, float]:
    """Price of an hour by kind, where the trace has it of one of its endpoints."""
    kinds = {item.name: item.accelerator for item in fleet.items}
    found: dict[str, float] = {}
    for endpoint in recording.fleets[-1].endpoints:
        price = endpoint.price_per_hour or _number(endpoint.labels.get(PRICE_LABEL, ""))
        if price > 0 and endpoint.name in kinds:
            found.setdefault(kinds[endpoint.name], price)
    return found


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def recorded_fleet(recording: Recording) -> tuple[Fleet, list[str]]:
    """The endpoints of the trace, and what has to be said of how well they are known."""
    known: dict[str, Known] = {}
    for fleet in recording.fleets:
        for endpoint in fleet.endpoints:
            before = known.get(endpoint.name)
            if before and before.learned and not endpoint.learned:
                endpoint = structs.replace(endpoint, learned=before.learned)
            known[endpoint.name] = endpoint
    used = {request.endpoint for request in recording.requests}
    missing = sorted(used - set(known))
    if missing:
        raise SettingsError(f"trace: it has requests but nothing else of {', '.join(missing)}")
    unlearned = sorted(name for name in used if not known[name].learned)
    if unlearned:
        raise SettingsError(
            f"trace: nothing was learned of {', '.join(unlearned)}: record it under a policy that learns, "
            "such as least-cost, for a minute or more"
        )
    rested = sorted(name for name in known if not known[name].learned)
    endpoints = [known[name] for name in known if known[name].learned]
    kinds = _kinds(endpoints)
    models = tuple(dict.fromkeys(request.model for request in recording.requests if request.model))
    seen = _seen(recording, kinds)
    alike = Counter(kinds.values())
    items = []
    for endpoint in endpoints:
        kind = kinds[endpoint.name]
        rate = seen[kind].requests / alike[kind] / recording.span_s
        speed = _parameters(endpoint, recording.tokens_told, seen[kind], rate)
        items.append(_item(endpoint, kind, models, speed))
    return Fleet(tuple(items)), [
        *_remarks(endpoints, recording),
        *(f"left out, never used: {n}" for n in rested),
    ]


def _remarks(endpoints: Sequence[Known], recording: Recording) -> list[str]:
    remarks = []
    little = [e.name for e in endpoints if _learned(e).evidence_s < LEAST_EVIDENCE_S]
    if little:
        remarks.append(f"known from less than {LEAST_EVIDENCE_S:g} s of samples: {', '.join(little)}")
    untold = [e.name for e in endpoints if not e.kv_blocks]
    if untold:
        remarks.append(f"KV size not published, so never full here: {', '.join(untold)}")
    last = {e.name for e in recording.fleets[-1].endpoints}
    changed = sorted({e.name for f in recording.fleets for e in f.endpoints} ^ last)
    first = {e.name for e in recording.fleets[0].endpoints}
    changed = sorted({*changed, *(last - first)})
    if changed:
        remarks.append(f"came or went meanwhile, here always there: {', '.join(changed)}")
    return remarks


def _kinds(endpoints: Sequence[Known]) -> dict[str, str]:
    """The kind of each endpoint: its label, or the name of the first one that is like it."""
    found: dict[str, str] = {}
    firsts: list[Known] = []
    for endpoint in endpoints:
        label = next((endpoint.labels[key] for key in KIND_LABELS if key in endpoint.labels), "")
        if not label:
            like = next((first for first in firsts if _alike(first, endpoint)), None)
            if like is None:
                firsts.append(endpoint)
            label = (like or endpoint).name
        found[endpoint.name] = label
    return found


def _alike(one: Known, other: Known) -> bool:
    return (
        one.kv_blocks > 0
        and (one.engine, one.block_tokens, one.models) == (other.engine, other.block_tokens, other.models)
        and abs(one.kv_blocks - other.kv_blocks) <= KV_TOLERANCE * one.kv_blocks
    )


def _item(endpoint: Known, kind: str, models: Sequence[str], measured: EngineParameters) -> FleetItem:
    return FleetItem(
        name=endpoint.name,
        accelerator=kind,
        model=endpoint.models or tuple(models) or MODELS[0],
        measured=measured,
        enable_prefix_caching=endpoint.prefix_caching is not False,
        labels=endpoint.labels,
        weight=endpoint.weight,
    )


def _learned(endpoint: Known) -> Learned:
    try:
        return msgspec.convert(endpoint.learned, Learned)
    except msgspec.ValidationError as exc:
        raise SettingsError(f"trace: what was learned of {endpoint.name}: {exc}") from exc


class _Seen(msgspec.Struct):
    """What the requests to one kind of endpoint show of it, in the engine's tokens and seconds."""

    cached: list[tuple[int, float]] = []
    """Prompts of which nearly all was cached: uncached tokens, and how long the first token took beyond the
    steps it waits for.
    """
    computed: list[tuple[int, float]] = []
    """The same of prompts with many uncached tokens that no other such prompt was before."""
    steps_s: list[float] = []
    requests: int = 0


def _seen(recording: Recording, kinds: Mapping[str, str]) -> dict[str, _Seen]:
    found = {kind: _Seen() for kind in kinds.values()}
    busy_until_s: dict[str, float] = {}
    for r in recording.requests:
        seen = found[kinds[r.endpoint]]
        seen.requests += 1
        if not r.stream or r.ttft_s is None or r.predicted_step_s is None:
            continue
        seen.steps_s.append(r.predicted_step_s)
        held = r.matched_tokens if r.cached_tokens is None else r.cached_tokens
        uncached = max(0, recording.prompt_tokens(r) - held)
        beyond_s = r.ttft_s - STEPS_BEFORE_TOKEN * r.predicted_step_s
        if uncached <= FEW_TOKENS:
            seen.cached.append((uncached, beyond_s))
        elif uncached >= MANY_TOKENS:
            before_s = busy_until_s.get(r.endpoint, 0.0)
            busy_until_s[r.endpoint] = max(before_s, r.at_s + r.ttft_s)
            if r.at_s >= before_s:
                seen.computed.append((uncached, beyond_s))
    return found


def _prefill(learned_s: float, seen: _Seen) -> tuple[float, float]:
    """Seconds for a prompt token, and how much longer a step takes that has any prefill in it.

    The predictor knows the first alone, with the second in it, and little where prompts are mostly cached.
    The medians of what requests met tell them apart; where there are too few, what was learned stands.
    """
    token_s = learned_s
    step_s = 0.0
    for _ in range(PASSES):
        if len(seen.cached) >= ENOUGH:
            step_s = max(0.0, median(beyond_s - token_s * tokens for tokens, beyond_s in seen.cached))
        if len(seen.computed) >= ENOUGH:
            found_s = median((beyond_s - step_s) / tokens for tokens, beyond_s in seen.computed)
            token_s = max(learned_s / MOST_TIMES, min(found_s, learned_s * MOST_TIMES))
    return token_s, step_s


def _parameters(endpoint: Known, tokens_told: float, seen: _Seen, rate: float) -> EngineParameters:
    """What was learned in the router's tokens, in those of the engine. ``rate`` are requests a second here:
    what their prefills add to steps is in the learned step and taken out of it.
    """
    learned = _learned(endpoint)
    block_tokens = endpoint.block_tokens or UNTOLD_BLOCK_TOKENS
    base_s = learned.step_rest_s - learned.step_sequence_s
    token_s, prefill_step_s = _prefill(1 / learned.prefill_tok_s / tokens_told, seen)
    if prefill_step_s:
        base_s -= min(base_s / 2, prefill_step_s * rate * median(seen.steps_s))
    return EngineParameters(
        base_s=max(1e-6, base_s),
        sequence_s=learned.step_sequence_s,
        context_token_s=learned.step_context_token_s / tokens_told,
        prefill_tokens_per_s=1 / token_s,
        prefill_step_s=prefill_step_s,
        kv_tokens=endpoint.kv_blocks * block_tokens or UNTOLD_KV_TOKENS,
        max_sequences=MAX_SEQUENCES,
        block_tokens=block_tokens,
    )


def _middle(alike: Sequence[FleetItem]) -> EngineParameters:
    """As fast as the one in the middle, in each respect."""
    sets = [item.measured for item in alike if item.measured is not None]
    speeds = ("base_s", "sequence_s", "context_token_s", "prefill_tokens_per_s")
    return structs.replace(sets[0], **{name: median(getattr(s, name) for s in sets) for name in speeds})


_COUNTED = re.compile(r"(?:(\d+)x)?(.+)")


def counted(text: str, option: str) -> tuple[int | None, str]:
    """``4xmi325x`` taken apart; None when there is no count."""
    found = _COUNTED.fullmatch(text)
    if found is None or found[1] == "0":
        raise SettingsError(f"{option}: {text!r}: write a kind, with a count as in 4xmi325x")
    return (int(found[1]) if found[1] else None), found[2]


def add(fleet: Fleet, change: str, kinds: Kinds) -> Fleet:
    """With ``4xKIND`` more."""
    count, kind = counted(change, "--add")
    return _with(fleet, count or 1, kind, kinds, "--add")


def remove(fleet: Fleet, change: str) -> Fleet:
    """Without an endpoint of that name, or without ``2xKIND``; ``KIND`` alone: without all of it."""
    return _without(fleet, change, "--remove")[0]


def replace(fleet: Fleet, change: str, kinds: Kinds) -> Fleet:
    """``OLD=NEW``: what ``remove`` takes out, and what comes in; as many of them unless it says a count."""
    old, equals, new = change.partition("=")
    if not (old and equals and new):
        raise SettingsError(f"--replace: {change!r}: write OLD=NEW, as in gaudi3=mi325x")
    left, gone = _without(fleet, old, "--replace")
    count, kind = counted(new, "--replace")
    return _with(left, count or gone, kind, kinds, "--replace")


def of_counts(fleet: Fleet, counts: Mapping[str, int], kinds: Kinds) -> Fleet:
    """So many of each kind, those of the trace first."""
    found = Fleet(())
    for kind, count in counts.items():
        there = [item for item in fleet.items if item.accelerator == kind][:count]
        found = Fleet((*found.items, *there))
        if count > len(there):
            found = _with(found, count - len(there), kind, kinds, "--cheapest")
    return found


def _with(fleet: Fleet, count: int, kind: str, kinds: Kinds, option: str) -> Fleet:
    try:
        like = kinds.find(kind)
    except SettingsError as error:
        raise SettingsError(f"{option}: {error.message}") from error
    taken = {item.name for item in fleet.items}
    names = (name for i in range(count + len(taken)) if (name := f"{kind}+{i + 1}") not in taken)
    more = [structs.replace(like, name=name) for _, name in zip(range(count), names, strict=False)]
    return Fleet((*fleet.items, *more))


def _without(fleet: Fleet, change: str, option: str) -> tuple[Fleet, int]:
    items = fleet.items
    gone = [item for item in items if item.name == change]
    if not gone:
        count, kind = counted(change, option)
        alike = [item for item in items if item.accelerator == kind]
        if not alike:
            known = (*fleet.counts, *(item.name for item in items))
            raise SettingsError(
                f"{option}: there is no {kind!r}{hint(kind, known)}; there are {', '.join(fleet.counts)}"
            )
        if count and count > len(alike):
            raise SettingsError(f"{option}: {change}: there are only {len(alike)}")
        gone = alike[-(count or len(alike)) :]
    left = tuple(item for item in items if item not in gone)
    return Fleet(left), len(gone)
