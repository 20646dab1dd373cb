"""Draw a saved run: ``python bench/plot.py RESULTS.json -o DIR`` writes ``speedup.png`` and ``roofline.png``.

The roofline is left out if no row counts operations.
"""
from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

Row = Mapping[str, Any]

COLOURS = {"float32": "#3b6ea5", "bfloat16": "#d1792c"}
MARKERS = "oDs^vP*"
INK, FAINT = "#222222", "#bbbbbb"
STYLE: dict[Any, Any] = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#777777",
    "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left", "text.color": INK,
}


def load(path: Path) -> list[Row]:
    """The timed rows of pytest-benchmark's JSON, each its ``extra_info`` and, as ``seconds``, the median of ours.

    Raises:
        ValueError: the file holds none.
    """
    benchmarks = json.loads(path.read_text())["benchmarks"]
    timed = (b for b in benchmarks if "peers" in b["extra_info"])
    rows: list[Row] = [{**b["extra_info"], "seconds": b["stats"]["median"]} for b in timed]
    if not rows:
        raise ValueError(f"plot: {path}: expected rows that were timed, got none of {len(benchmarks)}")
    return rows


def speedup(rows: Sequence[Row], axes: Axes) -> None:
    """A bar for each row to the released code's time over ours, a mark for each peer; 1 is as fast as the peer."""
    labels = list(dict.fromkeys((row["op"], row["size"]) for row in rows))
    dtypes = [d for d in COLOURS if any(row["dtype"] == d for row in rows)]
    peers = list(dict.fromkeys(name for row in rows for name in row["peers"]))
    height = 0.76 / len(dtypes)
    for row in rows:
        nth = dtypes.index(row["dtype"])
        y = labels.index((row["op"], row["size"])) + height * (nth - (len(dtypes) - 1) / 2)
        ratios = {name: peer["speedup"] for name, peer in row["peers"].items()}
        released = ratios["reference"]
        axes.barh(y, released - 1, left=1, height=0.9 * height, color=COLOURS[row["dtype"]], alpha=0.35, zorder=2)
        for name, ratio in ratios.items():
            axes.plot(ratio, y, MARKERS[peers.index(name)], color=COLOURS[row["dtype"]], ms=5.5, mec="white", mew=0.6,
                      zorder=3)
        axes.text(0.99, y, f"{released:.2g}x", transform=axes.get_yaxis_transform(), ha="right", va="center",
                  fontsize=8, color=COLOURS[row["dtype"]])
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}x"))
    low = min(peer["speedup"] for row in rows for peer in row["peers"].values())
    high = max(peer["speedup"] for row in rows for peer in row["peers"].values())
    axes.set_xlim(min(0.9, 0.9 * low), max(2.0, 2 * high))
    axes.axvline(1, color=INK, lw=1, zorder=4)
    axes.grid(axis="x", which="both", color=FAINT, lw=0.5, alpha=0.6, zorder=0)
    axes.set_yticks(range(len(labels)), [f"{op}\n{size}" for op, size in labels])
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("time of the peer / time of panda_kernels (log scale; right of 1x is faster)")
    axes.set_title("Speed-up over torch (bars and figures: over the reference, the code as released)")
    handles: list[Artist] = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[d], alpha=0.6, label=d) for d in dtypes]
    handles += [plt.Line2D([], [], ls="", marker=MARKERS[i], color="#666666", label=n) for i, n in enumerate(peers)]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)


def roofline(rows: Sequence[Row], axes: Axes) -> None:
    """Arithmetic rate over intensity, under the copy and matrix-product rates measured in the same run."""
    peaks = rows[0]["peaks"]
    intensities = [row["flops"] / row["bytes"] for row in rows if row["flops"]]
    left, right = 0.5 * min(intensities), 4 * max(intensities)
    bandwidths = {"copy in memory": (peaks["memory_gb_s"], ":"), "copy in L3": (peaks["l3_gb_s"], "-")}
    top = max(peaks["gflop_s"].values())
    low = min(row["gflop_s"] for row in rows if row["flops"])
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(0.5 * low, 2 * top))
    for name, (rate, style) in bandwidths.items():
        label = f"{name}, {rate:.0f} GB/s"
        axes.plot([left, top / rate], [left * rate, top], style, color="#777777", lw=1.2, zorder=1, label=label)
    for dtype, rate in peaks["gflop_s"].items():
        start = rate / max(r for r, _ in bandwidths.values())
        axes.plot([start, right], [rate, rate], color=COLOURS[dtype], lw=1.5, zorder=1)
        axes.annotate(f"{dtype} matrix product, {rate:.0f} GFLOP/s", (right, rate), (0, 4), ha="right",
                      textcoords="offset points", fontsize=8, color=COLOURS[dtype])
    names = list(dict.fromkeys((row["op"], row["size"]) for row in rows if row["flops"]))
    for row in rows:
        if not row["flops"]:
            continue
        x, y = row["flops"] / row["bytes"], row["gflop_s"]
        axes.plot(x, y, "o", ms=11, color=COLOURS[row["dtype"]], mec="white", mew=0.8, zorder=3)
        axes.annotate(str(names.index((row["op"], row["size"])) + 1), (x, y), ha="center", va="center_baseline",
                      fontsize=7, color="white", weight="bold", zorder=4)
    axes.set(xlabel="operations per byte, at the least of each", ylabel="GFLOP/s", title="Roofline")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(which="major", color=FAINT, lw=0.5, alpha=0.6, zorder=0)
    axes.legend(loc="lower right", frameon=False, fontsize=8)
    listing = "\n".join(f"{i:>2}  {op}, {size}" for i, (op, size) in enumerate(names, 1))
    axes.annotate(listing, (1.02, 1), xycoords="axes fraction", va="top", fontsize=8, linespacing=1.5)


def caption(rows: Sequence[Row]) -> str:
    row = rows[0]
    return (f"{row['device']}, {row['threads']} threads, torch {row['versions']['torch']}, panda_kernels "
            f"{row['versions']['panda_kernels']}, commit {row['commit'][:9]}{' with changes' if row['dirty'] else ''}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="what pytest bench/ --benchmark-json wrote")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="folder, made if missing")
    args = parser.parse_args(arguments)
    rows = load(args.results)
    args.out.mkdir(parents=True, exist_ok=True)
    heights = {"speedup": 1.6 + 0.5 * len({(row["op"], row["size"]) for row in rows}), "roofline": 6.0}
    for draw in (speedup, roofline) if any(row["flops"] for row in rows) else (speedup,):
        with plt.rc_context(STYLE):
            figure, axes = plt.subplots(figsize=(10, heights[draw.__name__]))
            draw(rows, axes)
            figure.text(0.01, 0.005, caption(rows), fontsize=7.5, color="#666666")
            figure.tight_layout(rect=(0, 0.025, 1, 1))
            figure.savefig(args.out / f"{draw.__name__}.png", dpi=150)
            plt.close(figure)
            print(args.out / f"{draw.__name__}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
