"""Faults in the values of corners and offsets, which only a real tensor shows.

Looked for where looking is free, on the CPU; asking another device would wait for it.
"""
from __future__ import annotations

import itertools

from torch import Tensor

from ..checks import Checks


def check_corners(check: Checks, corners: Tensor, window: int, *, rows: int | None = None,
                  cols: int | None = None) -> tuple[int, int] | None:
    """Totals of windows and of tokens that the corners hold, or None where they cannot be read without waiting."""
    if corners.device.type != "cpu":
        return None
    windows = tokens = 0
    for frame, (r0, r1, c0, c1) in enumerate(corners.tolist()):
        inside = (rows is None or r1 <= rows) and (cols is None or c1 <= cols)
        if min(r0, c0) < 0 or r1 - r0 < window or c1 - c0 < window or not inside:
            grid = "" if rows is None else f" inside the grid of {rows} x {cols}"
            check.fail("corners", f"a rectangle of at least {window} x {window} patches{grid} in frame {frame}",
                       f"rows {r0} to {r1}, columns {c0} to {c1}")
        h, w = (r1 - r0) // window, (c1 - c0) // window
        windows += h * w
        tokens += 1 + h * (w + 1)
    return windows, tokens


def check_offsets(check: Checks, cu_seqlens: Tensor, total: int) -> None:
    if cu_seqlens.device.type != "cpu":
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != total or any(a > b for a, b in itertools.pairwise(bounds)):
        check.fail("cu_seqlens", f"offsets that rise from 0 to {total}, the number of tokens", bounds)
