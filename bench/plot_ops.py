"""Pictures of the contests of ops and tower: speed-up over each peer, and the roofline."""
from __future__ import annotations

from collections.abc import Sequence

from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter

from .machine import Peaks
from .plot import COLOURS, FAINT, INK
from .records import OURS, Row, contests, speedups

MARKERS = "oDs^vP*X<>dhp"


def speedup(rows: Sequence[Row], figure: Figure) -> None:
    """A bar for each contest to the released code's time over ours, a mark for each peer; 1 is as fast as the peer."""
    axes = figure.subplots()
    found = contests(rows)
    labels = list(dict.fromkeys((op, size) for op, size, _ in found))
    dtypes = [d for d in COLOURS if any(dtype == d for _, _, dtype in found)]
    # A peer that runs in another dtype than its row's says so after its name: a hollow mark.
    peers = list(dict.fromkeys(name.split(" (")[0] for contest in found.values() for name in speedups(contest)))
    hollow = [name.split(" (")[1].rstrip(")") for contest in found.values() for name in contest if " (" in name]
    height = 0.76 / len(dtypes)
    ratios = {labels: speedups(contest) for labels, contest in found.items()}
    for (op, size, dtype), of_peer in ratios.items():
        y = labels.index((op, size)) + height * (dtypes.index(dtype) - (len(dtypes) - 1) / 2)
        released = next(ratio for name, ratio in of_peer.items() if name.startswith("reference"))
        axes.barh(y, released - 1, left=1, height=0.9 * height, color=COLOURS[dtype], alpha=0.35, zorder=2)
        for name, ratio in of_peer.items():
            plain, _, other_dtype = name.partition(" (")
            face, edge = ("white", COLOURS[dtype]) if other_dtype else (COLOURS[dtype], "white")
            axes.plot(ratio, y, MARKERS[peers.index(plain) % len(MARKERS)], mfc=face, mec=edge, ms=5.5,
                      mew=1.2 if other_dtype else 0.6, zorder=3)
        axes.text(0.99, y, f"{released:.2g}x", transform=axes.get_yaxis_transform(), ha="right", va="center",
                  fontsize=8, color=COLOURS[dtype])
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}x"))
    every = [ratio for of_peer in ratios.values() for ratio in of_peer.values()]
    axes.set_xlim(min(0.9, 0.9 * min(every)), max(2.0, 2 * max(every)))
    axes.axvline(1, color=INK, lw=1, zorder=4)
    axes.grid(axis="x", which="both", color=FAINT, lw=0.5, alpha=0.6, zorder=0)
    axes.set_yticks(range(len(labels)), [f"{op}\n{size}" for op, size in labels])
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("time of the peer / time of panda_kernels (log scale; right of 1x is faster)")
    axes.set_title("Speed-up over torch (bars and figures: over the reference, the code as released)")
    handles: list[Artist] = [Rectangle((0, 0), 1, 1, color=COLOURS[d], alpha=0.6, label=d) for d in dtypes]
    handles += [Line2D([], [], ls="", marker=MARKERS[i % len(MARKERS)], color="#666666", label=name)
                for i, name in enumerate(peers)]
    if hollow:
        label = f"hollow: torch in {hollow[0]}"
        handles.append(Line2D([], [], ls="", marker="o", mfc="white", mec="#666666", label=label))
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)


def roofline(rows: Sequence[Row], figure: Figure) -> None:
    """Ours: arithmetic rate over intensity, under the copy and matrix-product rates measured in the same run."""
    axes = figure.subplots()
    peaks = Peaks.of(rows)
    ours = [row for row in rows if row.contender == OURS and row.metric == "seconds" and row.flops and row.gflop_s]
    rates = {row.key: row.gflop_s or 0.0 for row in ours}
    intensities = [row.flops / row.bytes for row in ours]
    left, right = 0.5 * min(intensities), 4 * max(intensities)
    bandwidths = {"copy in memory": (peaks.memory_gb_s, ":"), "copy in cache": (peaks.l3_gb_s, "-")}
    top = max(peaks.gflop_s.values())
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(0.5 * min(rates.values()), 2 * top))
    for name, (rate, style) in bandwidths.items():
        label = f"{name}, {rate:.0f} GB/s"
        axes.plot([left, top / rate], [left * rate, top], style, color="#777777", lw=1.2, zorder=1, label=label)
    for nth, (dtype, rate) in enumerate(peaks.gflop_s.items()):
        start = rate / max(r for r, _ in bandwidths.values())
        axes.plot([start, right], [rate, rate], color=COLOURS[dtype], lw=1.5, zorder=1)
        # Two dtypes may have one peak, where one runs in the other's arithmetic.
        below = nth > 0 and rate < 1.3 * min(peaks.gflop_s.values())
        axes.annotate(f"{dtype} matrix product, {rate:.0f} GFLOP/s", (right, rate), (0, -12 if below else 4),
                      ha="right", textcoords="offset points", fontsize=8, color=COLOURS[dtype])
    names = list(dict.fromkeys((row.op, row.size) for row in ours))
    for row in ours:
        x, y = row.flops / row.bytes, rates[row.key]
        axes.plot(x, y, "o", ms=11, color=COLOURS[row.dtype], mec="white", mew=0.8, zorder=3)
        axes.annotate(str(names.index((row.op, row.size)) + 1), (x, y), ha="center", va="center_baseline",
                      fontsize=7, color="white", weight="bold", zorder=4)
    axes.set(xlabel="operations per byte, at the least of each", ylabel="GFLOP/s", title="Roofline")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(which="major", color=FAINT, lw=0.5, alpha=0.6, zorder=0)
    axes.legend(loc="lower right", frameon=False, fontsize=8)
    # Padded by spaces as wide as a digit.
    listing = "\n".join(f"{str(i).rjust(2, chr(0x2007))}  {op}, {size}" for i, (op, size) in enumerate(names, 1))
    axes.annotate(listing, (1.02, 1), xycoords="axes fraction", va="top", fontsize=8, linespacing=1.5)
