"""The names of the rows that scale, and what a picture needs of them: points, and the power that cost grows with."""
from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from .records import Row

CLIPS, ONE_CLIP, THREADS = "clips of 4 frames", "one clip", "threads"
Points = list[tuple[float, float]]


def by_frames(rows: Iterable[Row], op: str, contender: str, metric: str = "seconds") -> Points:
    """Frames and the metric, fewest first."""
    return sorted((float(row.size.split()[0]), row.median) for row in rows
                  if (row.op, row.contender, row.metric) == (op, contender, metric))


def by_threads(rows: Iterable[Row], contender: str) -> Points:
    return sorted((float(row.threads), row.median) for row in rows if (row.op, row.contender) == (THREADS, contender))


def fitted_slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the straight line through the logarithms of x and y by least squares: the power of x that y grows with."""
    xs, ys = ([math.log(point[i]) for point in points] for i in (0, 1))
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    across = sum((x - x_mean) ** 2 for x in xs)
    if not across:
        raise ValueError(f"fitted_slope: expected points at two or more x, got {list(points)}")
    return sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True)) / across
