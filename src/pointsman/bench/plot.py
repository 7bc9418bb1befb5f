"""Charts of a bench run, SVG or PNG by the file's ending."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pointsman.bench.histogram import Percentiles, load_hdrh
from pointsman.bench.report import Stage
from pointsman.errors import SettingsError

SUFFIXES = (".svg", ".png")


def load_pyplot() -> Any:
    """matplotlib without a display, or one line that says how to get it."""
    try:
        import matplotlib
    except ImportError as exc:
        raise SettingsError("charts need the package matplotlib: pip install 'pointsman[plots]'") from exc
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def check_plot(path: str) -> None:
    """Before a long run: can this plot be made at all?"""
    if Path(path).suffix not in SUFFIXES:
        raise SettingsError(f"--plot: {path}: must end in {' or '.join(SUFFIXES)}")
    load_pyplot()


def plot(stages: Sequence[Stage], path: str) -> None:
    """How TTFT, TPOT and end-to-end times are spread, and what a ladder of stages did to tokens a second."""
    pyplot = load_pyplot()
    ladder = len(stages) > 1
    figure, axes = pyplot.subplots(1, 4 if ladder else 3, figsize=(16 if ladder else 12, 3.8))
    spreads = (("TTFT from due", "ttft"), ("TPOT", "tpot"), ("end to end", "e2e"))
    for axis, (title, field) in zip(axes, spreads, strict=False):
        for stage in stages:
            _spread(axis, getattr(stage, field), stage.load)
        axis.set(title=title, xlabel="seconds", ylabel="share of requests", xscale="log", ylim=(0, 1))
    if ladder:
        labels = [stage.load for stage in stages]
        axes[3].plot(labels, [s.output_tok_s for s in stages], marker="o", label="by makespan")
        axes[3].plot(labels, [s.steady_output_tok_s or 0.0 for s in stages], marker="o", label="under load")
        axes[3].set(title="output tokens a second", ylim=(0, None))
        axes[3].tick_params(axis="x", rotation=30)
    for axis in axes:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize="small")
    save(figure, path)


def save(figure: Any, *paths: str) -> None:
    """Write a figure and let go of it."""
    try:
        for path in paths:
            figure.savefig(path, bbox_inches="tight", dpi=130)
    except OSError as exc:
        raise SettingsError(f"{exc.filename}: the chart cannot be written: {exc.strerror}") from exc
    finally:
        load_pyplot().close(figure)


def _spread(axis: Any, found: Percentiles | None, label: str) -> None:
    if found is None:
        return
    histogram = load_hdrh().HdrHistogram.decode(found.hdr.encode())
    shares = [i / 200 for i in range(201)]
    seconds = [max(histogram.get_value_at_percentile(share * 100), 1) / 1e6 for share in shares]
    axis.plot(seconds, shares, label=label)
