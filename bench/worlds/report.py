"""The worlds as Markdown tables and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from pointsman.bench.table import count, seconds
from pointsman.twin.compare import Summary
from pointsman.twin.seeds import Mean
from pointsman.twin.tables import with_interval

from .catalogue import World
from .verdict import LLM_D, Bar, Judged


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """One world: what each policy made of it, and the verdict on one of them."""

    world: World
    summaries: tuple[Summary, ...]
    to_llm_d: Mean
    """Output tok/s of the judged as a share of llm-d-blend's."""
    judged: Judged


def line(told: Told) -> str:
    """One world for the terminal."""
    judged = told.judged
    bars = "; ".join(f"{bar.name} {_bar(bar)}" for bar in judged.bars)
    return f"{judged.world:<22} {judged.outcome:<6}  {bars}"


def markdown(told: Sequence[Told]) -> str:
    """The verdicts, then every policy's figures."""
    return "\n".join([*_verdicts(told), "", *_figures(told)]) + "\n"


def to_json(told: Sequence[Told]) -> bytes:
    """Everything, for whoever wants to look closer."""
    worlds = [
        {
            "world": each.world.name,
            "kind": each.world.kind,
            "says": each.world.says,
            "outcome": each.judged.outcome,
            "to_llm_d": each.to_llm_d,
            "judged": each.judged,
            "summaries": each.summaries,
        }
        for each in told
    ]
    return msgspec.json.format(msgspec.json.encode({"worlds": worlds}), indent=1)


_VERDICTS = (
    *("world", "tok/s", "TTFT p99", f"tok/s of {LLM_D}", "tok/s of best other", "TTFT p99 of best other"),
    *("bars not held for sure", "verdict"),
)


def _verdicts(told: Sequence[Told]) -> Iterator[str]:
    yield from _row(*_VERDICTS)
    for each in told:
        judged = each.judged
        own = next(s for s in each.summaries if s.policy == judged.policy)
        bars = "; ".join(f"{bar.name}: {_bar(bar)}" for bar in judged.bars if bar.outcome != "holds")
        yield from _row(
            judged.world,
            _figure(own, "output_tok_s"),
            _figure(own, "ttft_p99_s"),
            _ratio(each.to_llm_d),
            f"{_ratio(judged.to_best)} ({judged.best})",
            f"{_ratio(judged.ttft_to_best)} ({judged.best_ttft})",
            bars,
            judged.outcome,
            head=False,
        )


def _figures(told: Sequence[Told]) -> Iterator[str]:
    policies = list(dict.fromkeys(s.policy for each in told for s in each.summaries))
    yield from _row("world: tok/s, TTFT p99, failed", *policies)
    for each in told:
        by_policy = {s.policy: s for s in each.summaries}
        yield from _row(each.world.name, *(_cell(by_policy[name]) for name in policies), head=False)


def _cell(summary: Summary) -> str:
    figures = summary.figures
    failed = figures["requests"].mean - figures["ok"].mean
    text = f"{_figure(summary, 'output_tok_s')}, {_figure(summary, 'ttft_p99_s')}"
    return f"{text}, {count(failed)}" if failed else text


def _figure(summary: Summary, name: str) -> str:
    found = summary.figures.get(name)
    if found is None:
        return "-"
    return (
        with_interval(found, seconds)
        if name.endswith("_s") and "tok" not in name
        else with_interval(found, count)
    )


def _ratio(found: Mean) -> str:
    half = "" if found.ci95 is None else f" ± {found.ci95:.3f}"
    return f"{found.mean:.3f}{half}"


def _bar(bar: Bar) -> str:
    return f"{_ratio(bar.found)} ({'at least' if bar.at_least else 'at most'} {bar.limit:g}: {bar.outcome})"


def _row(*cells: str, head: bool = True) -> Iterator[str]:
    yield "| " + " | ".join(cells) + " |" + ("\n|" + "---|" * len(cells) if head else "")
