"""Pictures of the whole tower: beside the encoders that it replaces, and how its cost grows."""
from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from .encoders import CLIP_8, CLIP_100, OP, PAPER
from .plot import FAINT, INK, OURS_COLOUR, REFERENCE_COLOUR
from .records import OURS, Row
from .scaling import CLIPS, ONE_CLIP, Points, by_frames, by_threads, fitted_slope

NAMES = {OURS: "STAB + projector,\nthese kernels", "reference": "STAB + projector,\nas released",
         CLIP_8: "CLIP ViT-L/14,\n8 frames", CLIP_100: "CLIP ViT-L/14,\n100 frames"}
ENCODER_COLOURS = {OURS: OURS_COLOUR, "reference": "#8fb3d6", CLIP_8: "#d1792c", CLIP_100: "#a8551a"}
PANELS = (("parameters", "million parameters", 1e-6), ("multiply_adds", "billion multiply-adds", 1e-9),
          ("seconds", "milliseconds", 1e3))


def encoders(rows: Sequence[Row], figure: Figure) -> None:
    """Table 3 of the paper, measured here in the first dtype there is, and the paper's own figures."""
    dtype = next(row.dtype for row in rows if row.op == OP)
    found = {(row.contender, row.metric): row for row in rows if row.op == OP and row.dtype == dtype}
    names = [name for name in NAMES if (name, "seconds") in found]
    for axes, (metric, label, unit) in zip(figure.subplots(1, len(PANELS), sharey=True), PANELS, strict=True):
        for y, name in enumerate(names):
            value = unit * found[name, metric].median
            axes.barh(y, value, height=0.6, color=ENCODER_COLOURS[name], zorder=2)
            axes.annotate(_short(value), (value, y), (4, 0), textcoords="offset points", va="center", fontsize=8.5)
            if name in PAPER:
                paper = unit * getattr(PAPER[name], metric)
                axes.plot(paper, y - 0.42, "D", ms=5.5, mfc="none", mec=INK, zorder=3)
                axes.annotate(_short(paper), (paper, y - 0.42), (6, 0), textcoords="offset points", va="center",
                              fontsize=7, color="#666666")
        axes.set_xscale("log")
        values = [unit * found[name, metric].median for name in names]
        values += [unit * getattr(p, metric) for p in PAPER.values()]
        axes.set_xlim(0.5 * min(values), 6 * max(values))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(label)
        axes.set_yticks(range(len(names)), [NAMES[name] for name in names])
        axes.set_ylim(len(names) - 0.5, -0.8)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color=FAINT, lw=0.5, alpha=0.6, zorder=0)
    figure.axes[0].set_title(f"The encoder of a video, {dtype}")
    notes = dict.fromkeys(f"{name.removeprefix('CLIP ')}: {found[name, 'seconds'].note}" for name in names
                          if found[name, "seconds"].note)
    figure.axes[-1].set_title("\n".join(["hollow: the paper, on its GPU", *notes]), loc="right", fontsize=7,
                              weight="normal", color="#666666")


def scaling(rows: Sequence[Row], figure: Figure) -> None:
    """Time against frames with the fitted slopes; where they were measured, peak memory, and what threads give."""
    panels = [_time]
    if by_frames(rows, CLIPS, OURS, "peak_bytes"):
        panels.append(_memory)
    if len(by_threads(rows, OURS)) > 1:
        panels.append(_threads)
    widths = [1.6, 1, 1][: len(panels)]
    for draw, axes in zip(panels, figure.subplots(1, len(panels), width_ratios=widths, squeeze=False)[0], strict=True):
        draw(rows, axes)
        axes.grid(color=FAINT, lw=0.5, alpha=0.6, zorder=0)


LINES = {(OURS, CLIPS): ("o-", OURS_COLOUR), (OURS, ONE_CLIP): ("s--", OURS_COLOUR),
         ("reference", CLIPS): ("o-", REFERENCE_COLOUR), ("reference", ONE_CLIP): ("s--", REFERENCE_COLOUR)}
LABELS = {OURS: "these kernels", "reference": "as released"}


def _time(rows: Sequence[Row], axes: Axes) -> None:
    for (contender, op), (style, colour) in LINES.items():
        points = by_frames(rows, op, contender)
        if len(points) < 2:
            continue
        label = f"{LABELS[contender]}, {op}: frames$^{{{fitted_slope(points):.2f}}}$"
        axes.plot(*zip(*points, strict=True), style, color=colour, ms=5, lw=1.3, label=label)
    axes.set(xscale="log", yscale="log", xlabel="frames of 448 x 448", ylabel="seconds", title="Time of the tower")
    _plain_ticks(axes, [x for op in (CLIPS, ONE_CLIP) for x, _ in by_frames(rows, op, OURS)])


def _memory(rows: Sequence[Row], axes: Axes) -> None:
    for contender, label in LABELS.items():
        points = [(x, y / 2**20) for x, y in by_frames(rows, CLIPS, contender, "peak_bytes")]
        axes.plot(*zip(*points, strict=True), *LINES[contender, CLIPS][:1], color=LINES[contender, CLIPS][1], ms=5,
                  lw=1.3, label=label)
    axes.set(xscale="log", yscale="log", xlabel="frames of 448 x 448", ylabel="MiB above the weights",
             title="Peak memory")
    _plain_ticks(axes, [x for x, _ in by_frames(rows, CLIPS, OURS, "peak_bytes")])


def _threads(rows: Sequence[Row], axes: Axes) -> None:
    most: float = 1
    for contender, label in LABELS.items():
        points: Points = by_threads(rows, contender)
        if points:
            most = points[-1][0]
            gains = [(threads, points[0][1] / seconds) for threads, seconds in points]
            axes.plot(*zip(*gains, strict=True), "o-", color=LINES[contender, CLIPS][1], ms=5, lw=1.3, label=label)
    axes.plot([1, most], [1, most], ":", color=INK, lw=1, label="in proportion")
    axes.set(xlabel="threads", ylabel="times as fast as on one", title="Threads, 8 frames", xlim=(0.9, most + 0.1),
             ylim=(0.9, most + 0.1))
    ticks = sorted({threads for threads, _ in by_threads(rows, OURS)})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.legend(frameon=False, fontsize=8)


def _plain_ticks(axes: Axes, frames: Sequence[float]) -> None:
    """Numbers of frames below, plain numbers beside, and room for the legend above the lines."""
    ticks = sorted(set(frames))
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.4)
    axes.legend(frameon=False, fontsize=8, loc="upper left")


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
