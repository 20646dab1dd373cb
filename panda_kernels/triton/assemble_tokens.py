"""Assembly of packed ragged frames: a gather of rows, and its gradient.

The floor is memory: each row read once and written once, no arithmetic. Where a frame's tokens begin is known to the
device only, and cumulated sums by torch would be half a dozen launches, each longer than the copy. So every program
runs through the corners itself, a block of frames at a time, and in the blocks that hold its rows finds the source of
each by comparing; corners are 32 bytes a frame and come out of the caches. Rows are then copied in pieces of 16 bytes
a thread. The gradient walks over the same tokens, so that it reads each row once, whichever gradient it belongs to;
split tokens are summed in the order of the rows, through float32 partial sums.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuning import Space, choose
from ._launch import Config, cdiv, launch

# What a token is a copy of: a row of y if not negative, the split token, or (-i + FRAME) that of frame i.
SPLIT = tl.constexpr(-1)
FRAME = tl.constexpr(-2)


@dataclass(frozen=True, kw_only=True)
class Tile(Config):
    rows: int
    block_c: int
    block_f: int = 16  # frames that are looked through at a time


def tile(y: Tensor) -> Tile:
    """Four loads of 16 bytes on their way in each thread, and some programs a multiprocessor even for a clip."""
    return Tile(rows=32, block_c=256 // y.element_size())


TILES: dict[str, tuple[int, ...]] = {"rows": (16, 32, 64), "block_c": (64, 128, 256), "threads": (128, 256)}
GATHER = Space("triton.assemble_tokens.gather", **TILES)
SCATTER = Space("triton.assemble_tokens.scatter", **TILES)


@triton.jit
def _sources(first_token, corners, frames, WINDOW: tl.constexpr, ROWS: tl.constexpr, BLOCK_F: tl.constexpr):
    """What each of the tokens ``[ROWS, 1]`` from the first on is a copy of; nonsense for tokens past the last."""
    token = first_token + tl.arange(0, ROWS)[:, None]
    source = tl.zeros([ROWS, 1], tl.int32)
    tokens_before = 0
    windows_before = 0
    for first_frame in range(0, frames, BLOCK_F):
        frame = first_frame + tl.arange(0, BLOCK_F)
        corner = frame.to(tl.int64)[:, None] * 4 + tl.arange(0, 4)[None, :]
        box = tl.load(corners + corner, mask=frame[:, None] < frames, other=0)
        begin, end = tl.split(tl.reshape(box, [BLOCK_F, 2, 2]))
        h, w = tl.split((end - begin).to(tl.int32) // WINDOW)
        tokens = 1 + h * (w + 1)
        tokens_after = tokens_before + tl.sum(tokens)
        if (tokens_before < first_token + ROWS) & (tokens_after > first_token):
            place = token - (tokens_before + tl.cumsum(tokens) - tokens)[None, :]
            window = windows_before + tl.cumsum(h * w) - h * w
            i = place - 1
            row = i // (w + 1)[None, :]
            ends_row = i - row * (w + 1)[None, :] == w[None, :]
            found = tl.where(ends_row, SPLIT, window[None, :] + i - row)
            found = tl.where(place == 0, -frame[None, :] + FRAME, found)
            here = (place >= 0) & (place < tokens[None, :])
            source += tl.sum(tl.where(here, found, 0), axis=1, keep_dims=True)
        tokens_before = tokens_after
        windows_before += tl.sum(h * w)
    return source


@triton.jit
def _place(corners, frames, num_tokens, C: tl.constexpr, WINDOW: tl.constexpr, ROWS: tl.constexpr,
           BLOCK_C: tl.constexpr, BLOCK_F: tl.constexpr):
    """This program's tokens ``[ROWS, 1]`` and channels ``[1, BLOCK_C]``, which exist, and the tokens' sources."""
    C_TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    c = tl.program_id(0) % C_TILES * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    first_token = tl.program_id(0) // C_TILES * ROWS
    source = _sources(first_token, corners, frames, WINDOW, ROWS, BLOCK_F)
    token = first_token + tl.arange(0, ROWS)[:, None]
    return token, c, (token < num_tokens) & (c < C), source


@triton.jit(do_not_specialize=["frames", "num_tokens"])
def gather(y, f, split, corners, tokens, frames, num_tokens, C: tl.constexpr, WINDOW: tl.constexpr,
           ROWS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_F: tl.constexpr):
    """``tokens[num_tokens, C]`` from ``y[num_windows, C]``, ``f[frames, C]`` and ``split[C]``."""
    token, c, inside, source = _place(corners, frames, num_tokens, C, WINDOW, ROWS, BLOCK_C, BLOCK_F)
    window = tl.load(y + (source.to(tl.int64) * C + c), mask=inside & (source >= 0), other=0.0)
    frame = tl.load(f + ((-source + FRAME).to(tl.int64) * C + c), mask=inside & (source <= FRAME), other=0.0)
    end = tl.load(split + (tl.zeros_like(source) + c), mask=inside & (source == SPLIT), other=0.0)
    value = tl.where(source >= 0, window, tl.where(source == SPLIT, end, frame))
    tl.store(tokens + (token.to(tl.int64) * C + c), value, mask=inside)


@triton.jit(do_not_specialize=["frames", "num_tokens"])
def scatter(grad, corners, grad_y, grad_f, partial, frames, num_tokens, C: tl.constexpr, WINDOW: tl.constexpr,
            ROWS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_F: tl.constexpr):
    """Each row of ``grad[num_tokens, C]`` to where it came from; sums of split tokens to ``partial[row tiles, C]``."""
    token, c, inside, source = _place(corners, frames, num_tokens, C, WINDOW, ROWS, BLOCK_C, BLOCK_F)
    value = tl.load(grad + (token.to(tl.int64) * C + c), mask=inside, other=0.0)
    if grad_y is not None:
        tl.store(grad_y + (source.to(tl.int64) * C + c), value, mask=inside & (source >= 0))
    if grad_f is not None:
        tl.store(grad_f + ((-source + FRAME).to(tl.int64) * C + c), value, mask=inside & (source <= FRAME))
    if partial is not None:
        ends = tl.where(source == SPLIT, value.to(tl.float32), 0.0)
        C_TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
        segment = partial + (tl.program_id(0) // C_TILES).to(tl.int64) * C
        tl.store(segment + c, tl.sum(ends, axis=0, keep_dims=True), mask=c < C)


def assemble(y: Tensor, f: Tensor, split: Tensor, corners: Tensor, num_tokens: int, window: int) -> Tensor:
    """``[num_tokens, C]`` from contiguous tensors."""
    C, config = y.shape[1], choose(GATHER, tile(y), y, C=y.shape[1], window=window)
    tokens = torch.empty(num_tokens, C, dtype=y.dtype, device=y.device)
    grid = cdiv(num_tokens, config.rows) * cdiv(C, config.block_c)
    launch(gather, grid, config, y=y, f=f, split=split, corners=corners, tokens=tokens, frames=f.shape[0],
           num_tokens=num_tokens, C=C, WINDOW=window)
    return tokens


def gradients(grad: Tensor, num_windows: int, corners: Tensor, window: int,
              needs: list[bool]) -> list[Tensor | None]:
    """Gradients of y, of f and (float32) of the split token, where needed, from contiguous tensors."""
    num_tokens, C = grad.shape
    config = choose(SCATTER, tile(grad), grad, C=C, window=window)
    row_tiles = cdiv(num_tokens, config.rows)
    shapes = (num_windows, grad.dtype), (corners.shape[0], grad.dtype), (row_tiles, torch.float32)
    grad_y, grad_f, partial = (torch.empty(rows, C, dtype=dtype, device=grad.device) if needed else None
                               for (rows, dtype), needed in zip(shapes, needs, strict=True))
    launch(scatter, row_tiles * cdiv(C, config.block_c), config, grad=grad, corners=corners, grad_y=grad_y,
           grad_f=grad_f, partial=partial, frames=corners.shape[0], num_tokens=num_tokens, C=C, WINDOW=window)
    return [grad_y, grad_f, None if partial is None else partial.sum(0)]
