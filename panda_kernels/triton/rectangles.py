"""What follows from the frames' rectangles: grids of windows and the offsets of ragged frames.

A kilobyte in and out, so that the floor is one launch; cumulated sums by torch are a dozen. One program walks through
the frames in blocks.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Config, launch


@dataclass(frozen=True, kw_only=True)
class Block(Config):
    block_f: int = 128  # frames at a time


@triton.jit(do_not_specialize=["frames"])
def measure(corners, grids, cu_windows, cu_seqlens, frames, WINDOW: tl.constexpr, BLOCK_F: tl.constexpr):
    """``grids[frames, 2]`` and offsets ``[frames + 1]`` of windows and of tokens, of ``corners[frames, 4]``."""
    windows_before = 0
    tokens_before = 0
    tl.store(cu_windows, 0)
    tl.store(cu_seqlens, 0)
    for first in range(0, frames, BLOCK_F):
        frame = first + tl.arange(0, BLOCK_F)
        inside = frame < frames
        corner = frame.to(tl.int64)[:, None] * 4 + tl.arange(0, 4)[None, :]
        box = tl.load(corners + corner, mask=inside[:, None], other=0)
        begin, end = tl.split(tl.reshape(box, [BLOCK_F, 2, 2]))
        side = (end - begin) // WINDOW
        place = frame.to(tl.int64)[:, None] * 2 + tl.arange(0, 2)[None, :]
        tl.store(grids + place, side, mask=inside[:, None])
        h, w = tl.split(side.to(tl.int32))
        windows = h * w
        tokens = tl.where(inside, 1 + h * (w + 1), 0)
        tl.store(cu_windows + 1 + frame, windows_before + tl.cumsum(windows), mask=inside)
        tl.store(cu_seqlens + 1 + frame, tokens_before + tl.cumsum(tokens), mask=inside)
        windows_before += tl.sum(windows)
        tokens_before += tl.sum(tokens)


class Measures(NamedTuple):
    grids: Tensor  # int64 [frames, 2]: h', w'
    cu_windows: Tensor  # int32 [frames + 1]
    cu_seqlens: Tensor  # int32 [frames + 1]


def measures(corners: Tensor, window: int) -> Measures:
    """Of contiguous ``corners[frames, 4]``, int64: what the methods of ``Rectangles`` give."""
    frames = corners.shape[0]
    found = Measures(torch.empty(frames, 2, dtype=torch.int64, device=corners.device),
                     *(torch.empty(frames + 1, dtype=torch.int32, device=corners.device) for _ in range(2)))
    launch(measure, 1, Block(), corners=corners, **found._asdict(), frames=frames, WINDOW=window)
    return found
