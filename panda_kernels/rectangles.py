"""The rectangles of patches that hold the pictures of a batch, and the ragged shapes that follow from them.

This module imports nothing of the package, so that every room may import it.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

EMPTY_FRAME_EXTENT = 16


def window_grid(corners: Tensor, window: int) -> Tensor:
    """Whole windows in each rectangle: corners ``[frames, 4]`` -> ``[frames, 2]`` (h', w'), on the same device."""
    return (corners[:, 1::2] - corners[:, ::2]) // window


def offsets(counts: Tensor) -> Tensor:
    """Counts ``[n]`` -> where each part begins in the packed whole, and where the last one ends, ``[n + 1]``."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


class Rectangles(NamedTuple):
    """One rectangle of patches a frame, frame ``b * T + t``, with the totals that a host needs to allocate by.

    ``corners`` is ``[frames, 4]`` int64 on the tokens' device: row0, row1, col0, col1 in patches, ends exclusive.
    ``num_windows`` sums ``h' * w'`` over the frames, ``num_tokens`` sums ``1 + h' * (w' + 1)``.
    """

    corners: Tensor
    num_windows: int
    num_tokens: int

    @classmethod
    def from_corners(cls, corners: Sequence[Sequence[int]] | Tensor, window: int = 2,
                     device: torch.device | str | None = None) -> Rectangles:
        """From corners known to the host: a sequence of (row0, row1, col0, col1), or a CPU tensor ``[frames, 4]``.

        Never waits for a device. ``device`` is where the tokens are, the CPU unless given.

        Raises:
            TypeError: corners that are not integers.
            ValueError: no frame, another shape, a tensor off the CPU, negative corners, or, naming the frame, a
                rectangle out of order or smaller than a window.
        """
        if isinstance(corners, Tensor) and corners.device.type != "cpu":
            raise ValueError(f"Rectangles: corners: expected a tensor on the cpu, got one on {corners.device}")
        host = torch.as_tensor(corners)
        if host.ndim != 2 or host.shape[1] != 4 or not len(host):
            raise ValueError(f"Rectangles: corners: expected shape [frames >= 1, 4], got {list(host.shape)}")
        if host.is_floating_point() or host.is_complex() or host.dtype == torch.bool:
            raise TypeError(f"Rectangles: corners: expected integers, got {host.dtype}")
        host = host.to(torch.int64)
        windows = rows = 0
        for frame, (row0, row1, col0, col1) in enumerate(host.tolist()):
            _check(frame, row0, row1, col0, col1, window)
            grid_rows = (row1 - row0) // window
            windows += grid_rows * ((col1 - col0) // window)
            rows += grid_rows
        placed = host.clone() if device is None else host.to(device, non_blocking=True)
        return cls(placed, windows, len(host) + windows + rows)

    @classmethod
    def from_mask(cls, mask: Tensor, patch: int = 14, window: int = 2) -> Rectangles:
        """From validity masks ``[B, T, H, W]`` of zeros and ones, any dtype, as SPEC stage 5 reads them.

        The first and the last patch, in row-major order, that hold anything valid are a rectangle's corners. A frame
        with nothing valid takes rows and columns 0..15 as far as they exist. Waits for the mask's device once.

        Raises:
            ValueError: another rank, no frame, a mask smaller than a patch, or, naming the frame, a rectangle out of
                order or smaller than a window.
        """
        if mask.ndim != 4 or mask.shape[0] * mask.shape[1] == 0:
            raise ValueError(f"Rectangles: mask: expected shape [B, T, H, W] with frames, got {list(mask.shape)}")
        height, width = mask.shape[2] // patch, mask.shape[3] // patch
        if not height * width:
            raise ValueError(f"Rectangles: mask: expected at least one patch of {patch} x {patch} pixels, "
                             f"got {mask.shape[2]} x {mask.shape[3]} pixels")
        rows = mask[:, :, :height * patch, :width * patch].unflatten(2, (height, patch)).any(3)
        cells = rows.unflatten(3, (width, patch)).any(4).flatten(2).flatten(0, 1).to(torch.uint8)
        first, last = cells.argmax(1), height * width - 1 - cells.flip(1).argmax(1)
        row0, col0 = first // width, first % width
        corners = torch.stack([row0, last // width + 1, col0, last % width + 1], 1)
        extent = [0, min(EMPTY_FRAME_EXTENT, height), 0, min(EMPTY_FRAME_EXTENT, width)]
        # first is 0 and last is the end where nothing is set; only the true emptiness tells such a frame.
        corners = torch.where(cells.any(1)[:, None].bool(), corners, corners.new_tensor(extent))
        return cls.from_corners(corners.cpu(), window, mask.device)

    @classmethod
    def full(cls, frames: int, h: int, w: int, window: int = 2,
             device: torch.device | str | None = None) -> Rectangles:
        """Every frame whole: ``h x w`` patches. Raises as :meth:`from_corners`."""
        return cls.from_corners([(0, h, 0, w)] * frames, window, device)

    def grid(self, window: int = 2) -> Tensor:
        """Windows in each frame, ``[frames, 2]`` int64 (h', w'), on the corners' device, without waiting for it."""
        return window_grid(self.corners, window)

    def cu_windows(self, window: int = 2) -> Tensor:
        """Offsets of each frame's windows in the packed windows, ``[frames + 1]`` int32."""
        return offsets(self.grid(window).prod(1)).int()

    def cu_seqlens(self, window: int = 2) -> Tensor:
        """Offsets of each frame's tokens in the packed tokens, ``[frames + 1]`` int32."""
        h, w = self.grid(window).unbind(1)
        return offsets(1 + h * (w + 1)).int()


def _check(frame: int, row0: int, row1: int, col0: int, col1: int, window: int) -> None:
    given = f"rows {row0} to {row1}, columns {col0} to {col1} (ends exclusive)"
    if row0 < 0 or col0 < 0:
        raise ValueError(f"Rectangles: frame {frame}: expected corners from 0 on, got {given}")
    if row1 <= row0 or col1 <= col0:
        raise ValueError(f"Rectangles: frame {frame}: the corners are out of order: {given}; "
                         f"expected the valid patches to fill a rectangle")
    if row1 - row0 < window or col1 - col0 < window:
        raise ValueError(f"Rectangles: frame {frame}: expected at least a window of {window} x {window} patches, "
                         f"got {row1 - row0} x {col1 - col0}: {given}")
