"""From the saved results: ``python -m bench.report`` draws ``bench/plots/`` and writes README's figures.

It shows the newest run of each kind of device; README's text between its two ``figures`` marks is this run's alone.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from . import encoders, pages, plot, plot_ops, plot_tower, scaling
from .machine import ROOT
from .readme_figures import text
from .records import OURS, STORE, Row, as_run, load, newest
from .tower import SHORT

SUFFIXES = {"cpu": "", "cuda": "_cuda"}


class Picture(NamedTuple):
    """One file of ``bench/plots/``, of ``size`` inches."""

    name: str
    draw: plot.Draw
    rows: Sequence[Row]
    size: tuple[float, float]


def pictures(rows: Sequence[Row], suffix: str) -> list[Picture]:
    """Those that the rows of one run are enough for."""
    plain = as_run(rows)
    usual = [row for row in plain if row.op == "peak" or _of_contest(row)]
    timed = {(row.op, row.size) for row in usual if row.op != "peak"}
    found = []
    if timed:
        found.append(Picture(f"speedup{suffix}.png", plot_ops.speedup, usual, (10, 1.6 + 0.5 * len(timed))))
    if any(row.gflop_s for row in usual):
        found.append(Picture(f"roofline{suffix}.png", plot_ops.roofline, usual, (10, 6)))
    if any(row.op == encoders.OP for row in plain):
        found.append(Picture(f"encoders{suffix}.png", plot_tower.encoders, plain, (10, 3.6)))
    if len(scaling.by_frames(plain, scaling.CLIPS, OURS)) > 1:
        every_thread = [row for row in rows if not row.malloc]
        found.append(Picture(f"scaling{suffix}.png", plot_tower.scaling, every_thread, (11, 4)))
    return found


def figures(rows: Sequence[Row]) -> tuple[str, list[Picture]]:
    """README's text between its marks, and the pictures it names."""
    texts, drawn = [], []
    for device_type, suffix in SUFFIXES.items():
        run = newest(rows, device_type)
        if run:
            of_run = pictures(run, suffix)
            texts.append(text(run, [picture.name for picture in of_run]))
            drawn += of_run
    return "\n".join(texts), drawn


def _of_contest(row: Row) -> bool:
    """An op or the tower at the sizes of a short run, against the reference."""
    special = (encoders.OP, scaling.CLIPS, scaling.ONE_CLIP, scaling.THREADS)
    return (row.metric == "seconds" and row.op not in special and not row.op.startswith("first token")
            and row.size in ("clips2", *SHORT))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=STORE)
    parser.add_argument("--plots", type=Path, default=ROOT / "bench" / "plots")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    args = parser.parse_args(arguments)
    written, drawn = figures(load(args.results))
    for picture in drawn:
        plot.save(picture.draw, picture.rows, args.plots / picture.name, picture.size)
        print(args.plots / picture.name)
    args.readme.write_text(pages.replaced(args.readme.read_text(), "figures", written))
    print(args.readme)
    return 0


if __name__ == "__main__":
    sys.exit(main())
