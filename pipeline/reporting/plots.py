"""Figures → SVG for a page, with its colours and its font. Pure; the only user of matplotlib.

Colours are drawn as stand-ins and replaced by CSS variables, so that a plot follows the reader's light or dark scheme.
What shows data is in a group whose id ends with `data`.
"""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from pipeline.reporting.figures import Figures, is_default
from pipeline.reporting.wording import NOT_KNOWN, compact, decimal

__all__ = ["Plot", "draw"]

WIDTH = 4.9
"""Inches: 353 units of an SVG, about the pixels of a phone, where text of 10 units stays legible."""

INK, MUTED, GRID = "#010203", "#020304", "#030405"
SERIES = ("#040506", "#050607", "#060708", "#070809", "#08090a")
VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--rule",
    **{colour: f"--series-{i}" for i, colour in enumerate(SERIES, 1)},
}
"""Stand-ins, and the variable of the page that each becomes."""

STYLE: Mapping[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 10.5,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.labelsize": 10.5,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "xtick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
}


@dataclass(frozen=True)
class Plot:
    """One picture, and the same in words for those who cannot see it."""

    name: str
    title: str
    description: str
    svg: str


def draw(figures: Figures) -> dict[str, Plot]:
    """Every plot that the figures are there for, by name."""
    found = [
        _recall_curve(figures),
        _list_sizes(figures),
        _levels(figures),
        _bytes(figures),
        _stages(figures),
        _memory(figures),
        _history(figures),
    ]
    return {plot.name: plot for plot in found if plot is not None}


# ------------------------------------------------------------------------------------------------ canvas


@contextmanager
def _styled(name: str) -> Iterator[None]:
    import matplotlib as mpl

    style: Any = {**STYLE, "svg.hashsalt": f"strata-{name}"}
    with mpl.rc_context():
        # Whatever a user's own matplotlibrc says, a release has one page.
        mpl.rcdefaults()
        mpl.rcParams.update(style)
        yield


def _axes(height: float, *, rows: int = 1, **layout: Any) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.patch.set_alpha(0)
    figure.get_layout_engine().set(h_pad=0.08, hspace=0.06)
    axes = list(np.atleast_1d(figure.subplots(rows, 1, **layout)))
    for one in axes:
        one.patch.set_alpha(0)
    return figure, axes


def _plot(figure: Any, name: str, title: str, description: str) -> Plot:
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing)
    return Plot(name, title, description, _inlined(buffer.getvalue(), name, title, description))


def _inlined(svg: str, name: str, title: str, description: str) -> str:
    """A whole SVG file as an element of a page: ids of its own, no rules for the rest of the page, our colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", svg)
    viewed = re.search(r'viewBox="([^"]*)"', svg)
    assert viewed is not None, "matplotlib writes a viewBox"  # noqa: S101  (an invariant of the library)
    head = f'<svg viewBox="{viewed[1]}" role="img" aria-labelledby="{name}-title {name}-desc">'
    head += (
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(description)}</desc>'
    )
    svg = head + svg[svg.index(">") + 1 :]
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg.strip()


def _bar_rows(axes: Any, names: Sequence[str], *, longest: float, room: float) -> None:
    """Horizontal bars: names at the left, and room for a label beside the longest bar."""
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlim(0, longest * (1 + room) or 1)
    axes.margins(y=0.02)


# ------------------------------------------------------------------------------------------------ quality


def _recall_curve(figures: Figures) -> Plot | None:
    curve = figures.measured.recall_curve
    if not curve:
        return None
    from matplotlib.ticker import FuncFormatter

    read = [point.bytes_per_query / 1024 for point in curve]
    default = next(point for point in curve if is_default(point, figures))
    panels = (
        ("recall@10", [point.recall_at_10 for point in curve]),
        ("posting lists", [point.lists_per_query for point in curve]),
        ("rows scanned, %", [100 * point.scanned_fraction for point in curve]),
    )
    with _styled("recall-curve"):
        figure, axes = _axes(5.6, rows=3, sharex=True, height_ratios=(1.5, 1, 1))
        for i, (one, (title, values)) in enumerate(zip(axes, panels, strict=True)):
            (line,) = one.plot(read, values, color=SERIES[0], marker="o", clip_on=False)
            line.set_gid(f"{i}-data")
            one.axvline(
                default.bytes_per_query / 1024, color=SERIES[2], linewidth=1.2, dashes=(4, 3), zorder=1
            )
            one.set_title(title)
            if i:
                one.set_ylim(0, max(values) * 1.08 or 1)
                one.yaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
        _log_ticks(axes[-1], read)
        axes[-1].set_xlabel("read per query, KiB")
        low, high = min(panels[0][1]), max(panels[0][1])
        axes[0].set_ylim(low - 0.06 * max(high - low, 0.01), high + 0.12 * max(high - low, 0.01))
        axes[0].annotate(
            "default",
            (default.bytes_per_query / 1024, 0.03),
            xycoords=("data", "axes fraction"),
            xytext=(-5, 0),
            textcoords="offset points",
            ha="right",
        )
        ends = f"from {curve[0].recall_at_10:.4f} at {read[0]:.0f} to {curve[-1].recall_at_10:.4f} at {read[-1]:.0f}"
        return _plot(
            figure,
            "recall-curve",
            "Recall against what a query reads",
            f"Recall at 10 goes {ends} KiB; the default reads {default.bytes_per_query / 1024:.0f}. The table has every point.",
        )


TICK_RATIO = 1.25
"""Of neighbouring labels on a logarithmic axis: nearer ones overlap."""


def _log_ticks(axes: Any, values: Sequence[float]) -> None:
    from matplotlib.ticker import NullLocator

    shown = [values[0]]
    for value in values:
        if value >= TICK_RATIO * shown[-1]:
            shown.append(value)
    axes.set_xscale("log", base=2)
    axes.set_xticks(shown, [compact(value) for value in shown])
    axes.xaxis.set_minor_locator(NullLocator())


# ------------------------------------------------------------------------------------------------ layout


def _list_sizes(figures: Figures) -> Plot | None:
    if figures.list_sizes is None:
        return None
    from matplotlib.ticker import MaxNLocator

    own, every = figures.list_sizes
    panels = (("vectors whose own list it is", own), ("with copies of others", every))
    both = np.append(own, every)
    bins = np.histogram_bin_edges(both, bins=min(30, max(1, int(np.ptp(both)) + 1)))
    with _styled("list-sizes"):
        figure, axes = _axes(4.2, rows=2, sharex=True)
        for number, (one, (title, sizes)) in enumerate(zip(axes, panels, strict=True)):
            counts, edges = np.histogram(sizes, bins=bins)
            bars = one.bar(edges[:-1], counts, np.diff(edges) * 0.92, align="edge", color=SERIES[0])
            _mark_bars(bars, first=number * len(counts))
            one.axvline(sizes.mean(), color=SERIES[2], linewidth=1.2, dashes=(4, 3))
            one.annotate(
                f"mean {decimal(float(sizes.mean()))}",
                (float(sizes.mean()), 1),
                xycoords=("data", "axes fraction"),
                xytext=(4, 3),
                textcoords="offset points",
            )
            one.set_title(title, pad=20)
            one.yaxis.set_major_locator(MaxNLocator(4, integer=True))
            one.grid(visible=False, axis="x")
        axes[-1].set_xlabel("entries of a posting list")
        spread = f"from {every.min()} to {every.max()} entries, {every.mean():.1f} on average, {own.mean():.1f} of them their own"
        return _plot(
            figure, "list-sizes", "Sizes of the posting lists", f"{len(every)} posting lists hold {spread}."
        )


def _mark_bars(bars: Any, *, first: int = 0) -> None:
    for i, bar in enumerate(bars, first):
        bar.set_gid(f"{i}-data")


def _levels(figures: Figures) -> Plot | None:
    partition = figures.manifest.partitions[0]
    levels, dims = partition.codes.levels, figures.manifest.dims_of(partition)
    with _styled("levels"):
        figure, (axes,) = _axes(1.0 + 0.26 * len(levels))
        bars = axes.barh(range(len(levels)), levels, height=0.82, color=SERIES[0])
        _mark_bars(bars)
        for row, width in enumerate(levels):
            axes.annotate(f"{width}", (width, row), xytext=(4, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(levels)), [f"bit {i}" for i in range(1, len(levels) + 1)])
        axes.invert_yaxis()
        axes.set_xlim(0, dims * 1.08)
        axes.set_xticks([dims * quarter // 4 for quarter in range(5)])
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(f"dimensions of {dims}, by falling variance")
        each = ", ".join(f"level {i}: {width}" for i, width in enumerate(levels, 1))
        return _plot(figure, "levels", "Bits of a code", f"Dimensions that get a bit of each level: {each}.")


def _bytes(figures: Figures) -> Plot | None:
    documents = max(figures.manifest.num_documents, 1)
    parts = {name: size / documents for name, size in figures.bytes_by_part.items()}
    float32 = figures.float32_bytes / documents
    with _styled("bytes"):
        figure, (axes,) = _axes(2.35)
        start = 0.0
        for i, (name, size) in enumerate(parts.items()):
            bars = axes.barh([0], [size], left=start, height=0.6, color=SERIES[i], label=name)
            bars[0].set_gid(f"{i}-data")
            start += size
        (bar,) = axes.barh([1], [float32], height=0.6, color=MUTED)
        bar.set_gid("float32-data")
        for row, total in enumerate((start, float32)):
            axes.annotate(
                decimal(total), (total, row), xytext=(4, 0), textcoords="offset points", va="center"
            )
        _bar_rows(axes, ["stored", "float32"], longest=max(start, float32), room=0.16)
        axes.set_xlabel("bytes per document")
        figure.legend(
            loc="outside upper left", ncols=5, handlelength=0.8, handletextpad=0.4, columnspacing=0.9
        )
        each = ", ".join(f"{name} {decimal(size)}" for name, size in parts.items())
        return _plot(
            figure,
            "bytes",
            "Bytes per document",
            f"{each}; float32 vectors alone would take {decimal(float32)}.",
        )


# ------------------------------------------------------------------------------------------------ run


def _stages(figures: Figures) -> Plot | None:
    seconds = figures.stage_seconds
    if not seconds:
        return None
    with _styled("stages"):
        figure, (axes,) = _axes(0.75 + 0.27 * len(seconds))
        longest = max(seconds.values())
        _mark_bars(axes.barh(range(len(seconds)), list(seconds.values()), height=0.66, color=SERIES[0]))
        for row, (stage, value) in enumerate(seconds.items()):
            rows = figures.stage_rows.get(stage)
            speed = f" · {compact(rows / value)} rows/s" if rows and value else ""
            axes.annotate(
                f"{decimal(value)}{speed}",
                (value, row),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
            )
        _bar_rows(axes, list(seconds), longest=longest, room=0.5)
        axes.set_xlabel("seconds")
        each = ", ".join(f"{stage} {decimal(value)}" for stage, value in seconds.items())
        return _plot(figure, "stages", "Seconds of each stage", f"{each}.")


def _memory(figures: Figures) -> Plot | None:
    memory = figures.stage_memory
    if not memory:
        return None
    with _styled("memory"):
        figure, (axes,) = _axes(1.0 + 0.42 * len(memory))
        places = np.arange(len(memory))
        both = {
            "estimate": [m.estimate_mb or 0 for m in memory.values()],
            "measured peak": [m.peak_mb or 0 for m in memory.values()],
        }
        for i, (name, values) in enumerate(both.items()):
            colour = (MUTED, SERIES[0])[i]
            bars = axes.barh(places + (i - 0.5) * 0.38, values, height=0.34, color=colour, label=name)
            for row, bar in enumerate(bars):
                bar.set_gid(f"{i}-{row}-data")
                label = f"{values[row]:,.0f}" if values[row] else NOT_KNOWN
                at = (values[row], bar.get_y() + bar.get_height() / 2)
                axes.annotate(label, at, xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)
        _bar_rows(axes, list(memory), longest=max(map(max, both.values())), room=0.16)
        axes.set_xlabel("MB of the largest task")
        figure.legend(loc="outside upper left", ncols=2, handlelength=0.8, handletextpad=0.4)
        each = ", ".join(
            f"{stage} {m.estimate_mb or 0:.0f} and {m.peak_mb or 0:.0f}" for stage, m in memory.items()
        )
        return _plot(figure, "memory", "Memory by stage", f"Estimate and measured peak in MB: {each}.")


HISTORY_SHOWN = 30
"""Newest releases in the plot; the table has them all."""


def _history(figures: Figures) -> Plot | None:
    lines = figures.history[-HISTORY_SHOWN:]
    if len(lines) < 2:  # noqa: PLR2004  (one point is no course)
        return None
    from matplotlib.ticker import MaxNLocator

    numbers = [line.release for line in lines]
    panels: tuple[tuple[str, list[float | None]], ...] = (
        ("documents", [line.measured.documents for line in lines]),
        ("recall@10", [line.measured.recall_at_10 for line in lines]),
        ("seconds", [line.measured.seconds.get("total") for line in lines]),
    )
    with _styled("history"):
        figure, axes = _axes(4.6, rows=3, sharex=True)
        current = next((line.release for line in lines if line.state == "current"), None)
        for i, (one, (title, values)) in enumerate(zip(axes, panels, strict=True)):
            found = [np.nan if value is None else float(value) for value in values]
            (line,) = one.plot(numbers, found, color=SERIES[0], marker="o", clip_on=False)
            line.set_gid(f"{i}-data")
            _history_scale(one, title, found)
            if current is not None:
                one.axvline(current, color=SERIES[2], linewidth=1.2, dashes=(4, 3), zorder=1)
        axes[-1].set_xlim(numbers[0] - 0.5, numbers[-1] + 0.5)
        axes[-1].xaxis.set_major_locator(MaxNLocator(12, integer=True))
        axes[-1].set_xlabel("release; the dashed line marks the current one")
        each = "; ".join(f"release {x.release}: {x.measured.documents} documents" for x in lines)
        return _plot(figure, "history", "Releases over time", f"{each}. The table below has every figure.")


def _history_scale(axes: Any, title: str, values: Sequence[float]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_title(title)
    axes.yaxis.set_major_locator(MaxNLocator(3, integer=title == "documents"))
    known = [value for value in values if value == value]  # noqa: PLR0124  (not NaN)
    if title == "recall@10":
        low = min(known, default=0.0)
        axes.set_ylim(max(0.0, low - max(0.01, 0.2 * (1 - low))), 1.0)
        return
    axes.set_ylim(0, max(known, default=1) * 1.15 or 1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
