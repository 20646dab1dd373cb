"""Stage 5, crop: the rectangle of patches that holds the picture, read from the validity mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EMPTY_FRAME_EXTENT = 16

Rectangle = tuple[int, int, int, int]
"""row0, row1, col0, col1 in patches, ends exclusive."""


@torch.no_grad()
def valid_rectangles(mask: Tensor, patch: int = 14, window: int = 2) -> list[Rectangle]:
    """The valid rectangle of each frame of a mask ``[B, T, H, W]``, frame ``b * T + t``.

    Raises ValueError, naming the frame, where the corners are out of order or a rectangle is smaller than a window.
    """
    grids = F.avg_pool2d(mask.flatten(0, 1)[:, None], patch)[:, 0]
    return [_rectangle(grid, i, window) for i, grid in enumerate(grids)]


def _rectangle(grid: Tensor, frame: int, window: int) -> Rectangle:
    height, width = grid.shape
    cells = grid.flatten().nonzero()[:, 0]
    if len(cells) == 0:
        row0, row1, col0, col1 = 0, min(EMPTY_FRAME_EXTENT, height), 0, min(EMPTY_FRAME_EXTENT, width)
    else:
        row0, col0 = divmod(int(cells[0]), width)
        last_row, last_col = divmod(int(cells[-1]), width)
        row1, col1 = last_row + 1, last_col + 1
    if col1 <= col0:
        raise ValueError(
            f"frame {frame}: the mask's first valid patch (row {row0}, column {col0}) and its last "
            f"(row {row1 - 1}, column {col1 - 1}) are no corners of a rectangle: the columns are out of order"
        )
    if row1 - row0 < window or col1 - col0 < window:
        raise ValueError(
            f"frame {frame}: the valid rectangle of {row1 - row0} x {col1 - col0} patches is smaller than a window of "
            f"{window} x {window}"
        )
    return row0, row1, col0, col1
