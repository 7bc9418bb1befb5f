"""The comparison as tables and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from pointsman.bench.histogram import Percentiles

from .accounts import Account, Accounts
from .cases import CASES
from .compare import Row

_FIGURES = (
    *("fleet", "policy", "seed", "tok/s twin", "live", "ratio", "TTFT p50 twin", "live", "ratio"),
    *("twin's own range", "", "TTFT p90 twin", "live", "TPOT p50 twin", "live", "hits twin", "live", ""),
)
_LAGS = ("fleet", "policy", "seed", "process", "late on average", "at most", "CPU", "runs that were void")


def line(row: Row) -> str:
    """One row for the terminal."""
    return (
        f"{row.case:<8} {row.policy:<14} seed {row.seed}: {row.live.stage.output_tok_s:,.0f} tok/s "
        f"({row.tok_s_ratio:.3f} of the twin's), TTFT p50 {_ms(row.live.stage.ttft, 'p50')} "
        f"({row.ttft_ratio:.3f}): {row.verdict}"
    )


def markdown(rows: Sequence[Row], accounts: Accounts) -> str:
    return "\n".join(_markdown(rows, accounts)) + "\n"


def _markdown(rows: Sequence[Row], accounts: Accounts) -> Iterator[str]:
    yield from _table(_FIGURES, map(_figures, rows))
    yield ""
    yield from _table(_LAGS, (lag for row in rows for lag in _lags(row)))
    yield ""
    for row in rows:
        for reason in (*row.voided, *row.void):
            yield f"- void: {row.case}, {row.policy}, seed {row.seed}: {reason}"
    yield ""
    for case in dict.fromkeys(row.case for row in rows):
        yield f"- {case}: {CASES[case].says}, {CASES[case].speed:g} engine seconds in one of ours"
    yield ""
    yield from _accounts(accounts)


def _figures(row: Row) -> list[str]:
    twin, live = row.twin, row.live.stage
    cells = [row.case, row.policy, str(row.seed)]
    cells += [f"{twin.output_tok_s:,.0f}", f"{live.output_tok_s:,.0f}", f"{row.tok_s_ratio:.3f}"]
    cells += [_ms(twin.ttft, "p50"), _ms(live.ttft, "p50"), f"{row.ttft_ratio:.3f}"]
    tokens, ttft = row.spread.output_tok_s, row.spread.ttft_p50_s
    cells += [f"{tokens.least:,.0f} to {tokens.most:,.0f}"]
    cells += [f"{ttft.least * 1000:,.0f} to {ttft.most * 1000:,.0f} ms"]
    cells += [_ms(twin.ttft, "p90"), _ms(live.ttft, "p90"), _ms(twin.tpot, "p50", 1)]
    cells += [_ms(live.tpot, "p50", 1), _share(twin.prefix_hit_rate), _share(live.prefix_hit_rate)]
    return [*cells, row.verdict]


def _lags(row: Row) -> Iterator[list[str]]:
    where = [row.case, row.policy, str(row.seed)]
    for name, lag in row.live.lags.items():
        late = f"{lag.mean_s * 1000:.2f} ms", f"{lag.max_s * 1000:.0f} ms"
        yield [*where, name, *late, f"{lag.cpu_share:.0%}", str(len(row.voided))]


def _accounts(accounts: Accounts) -> Iterator[str]:
    yield f"{len(accounts.live)} requests one at a time, counted differently: {len(accounts.differ)}"
    yield ""
    names = ("prompt_tokens", "cached_tokens", "output_tokens")
    totals = [
        [side, *(f"{_total(found, name):,}" for name in names)]
        for side, found in (("twin", accounts.twin), ("live", accounts.live))
    ]
    yield from _table(("", "prompt tokens", "cached", "output"), totals)


def _total(accounts: Sequence[Account], name: str) -> int:
    return sum(getattr(account, name) or 0 for account in accounts)


def _table(head: Sequence[str], rows: Any) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |\n|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def _ms(times: Percentiles | None, point: str, digits: int = 0) -> str:
    return "-" if times is None else f"{getattr(times, point) * 1000:,.{digits}f} ms"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def to_json(rows: Sequence[Row], accounts: Accounts) -> bytes:
    """Everything, for whoever wants to look closer."""
    told = [
        msgspec.to_builtins(row)
        | {"tok_s_ratio": row.tok_s_ratio, "ttft_ratio": row.ttft_ratio, "void": row.void}
        | {"verdict": row.verdict}
        for row in rows
    ]
    totals = {"requests": len(accounts.live), "differ": accounts.differ}
    return msgspec.json.format(msgspec.json.encode({"rows": told, "accounts": totals}), indent=1)
