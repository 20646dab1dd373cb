"""Assembly by places computed on the device: where each window, frame and split token goes."""
from __future__ import annotations

import torch
from torch import Tensor

from ...rectangles import offsets, window_grid
from . import refusals  # noqa: F401
from ._arithmetic import total


def _places(corners: Tensor, num_windows: int, num_tokens: int, window: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where in the packed tokens the windows' tokens, the frames' tokens and the split tokens go."""
    h, w = window_grid(corners, window).unbind(1)
    starts, cu_windows, cu_rows = offsets(1 + h * (w + 1)), offsets(h * w), offsets(h)

    item = torch.arange(num_windows, device=corners.device)
    frame = torch.searchsorted(cu_windows, item, right=True) - 1
    local = item - cu_windows[frame]
    windows = starts[frame] + 1 + local + local // w[frame]

    row = torch.arange(num_tokens - num_windows - corners.shape[0], device=corners.device)
    frame = torch.searchsorted(cu_rows, row, right=True) - 1
    splits = starts[frame] + (row - cu_rows[frame] + 1) * (w[frame] + 1)
    return windows, starts[:-1], splits


def fwd(y: Tensor, f: Tensor, split: Tensor, corners: Tensor, num_tokens: int, window: int) -> Tensor:
    windows, frames, splits = _places(corners, y.shape[0], num_tokens, window)
    tokens = y.new_empty(num_tokens, y.shape[1])
    tokens[windows] = y
    tokens[frames] = f
    tokens[splits] = split
    return tokens


def bwd(grad: Tensor, y: Tensor, f: Tensor, split: Tensor, corners: Tensor, num_tokens: int, window: int, *,
        needs: list[bool]) -> list[Tensor | None]:
    windows, frames, splits = _places(corners, y.shape[0], num_tokens, window)
    return [grad[windows] if needs[0] else None, grad[frames] if needs[1] else None,
            total(grad[splits]).to(split.dtype) if needs[2] else None]
