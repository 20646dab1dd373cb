"""What tests of a whole tower in one call have in common, on whichever backend."""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from panda_kernels.spec import relative_error


class Case(NamedTuple):
    """A tower and its frames; the rectangles are repeated over the frames of the clips."""

    frames: int
    grid: tuple[int, int]
    corners: tuple[tuple[int, int, int, int], ...]
    dim: int = 64
    heads: int = 8
    gstra_heads: int = 4
    window: int = 2
    patch: int = 4
    clips: int = 1
    pixels: str = "float"
    missing: bool = False

    def frame_size(self) -> tuple[int, int]:
        """Height and width, with some pixels left over beyond the last patch."""
        return self.grid[0] * self.patch + 1, self.grid[1] * self.patch + 3

    def all_corners(self) -> list[tuple[int, int, int, int]]:
        return [self.corners[i % len(self.corners)] for i in range(self.clips * self.frames)]


def errors(y: Tensor, exact: Tensor, firsts: Tensor) -> tuple[float, float]:
    """Of the frames' first tokens, and of all others."""
    is_first = torch.zeros(len(y), dtype=torch.bool).index_fill_(0, firsts.long(), True)
    return relative_error(y[is_first], exact[is_first]), relative_error(y[~is_first], exact[~is_first])
