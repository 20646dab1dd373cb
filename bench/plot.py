"""What all pictures share: colours, style, the line that says where the numbers come from, and how they are written."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from .records import Row

COLOURS = {"float32": "#3b6ea5", "bfloat16": "#d1792c", "float16": "#5b8c3e"}
OURS_COLOUR, REFERENCE_COLOUR = "#3b6ea5", "#999999"
INK, FAINT = "#222222", "#bbbbbb"
STYLE: dict[Any, Any] = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#777777",
    "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left", "text.color": INK,
}
Draw = Callable[[Sequence[Row], Figure], None]


def save(draw: Draw, rows: Sequence[Row], path: Path, size: tuple[float, float]) -> None:
    """Draw rows of one run as a PNG of ``size`` inches."""
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=size)
        draw(rows, figure)
        figure.text(0.01, 0.005, caption(rows), fontsize=7.5, color="#666666")
        figure.tight_layout(rect=(0, 0.03, 1, 1))
        path.parent.mkdir(parents=True, exist_ok=True)
        # Without a date or version inside, equal rows give equal files.
        figure.savefig(path, dpi=150, metadata={"Software": None})
        plt.close(figure)


def caption(rows: Sequence[Row]) -> str:
    row = rows[0]
    return (f"{row.device}, {max(row.threads for row in rows)} threads, {row.isa}, torch {row.torch}, panda_kernels "
            f"{row.panda_kernels}, commit {row.commit[:9]}{' with changes' if row.dirty else ''}")
