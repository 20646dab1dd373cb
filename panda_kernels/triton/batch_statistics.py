"""Mean and variance of each channel over all tokens, and their gradient, an affine map of the tokens.

The floor is memory: the forward reads 16.8 MB of bfloat16 tokens (8 frames), 5.6 us at 3 TB/s; the gradient reads them
for the mean again and to map them, and writes as much: 17 us. A program owns a strip of channels and one share of the
tokens, and merges its tiles' moments as it walks down (Chan's update, which subtracts no large sums); a second launch
merges the shares in order. SHARES programs a strip are enough to fill a card with 1024 channels (16 strips of 64).
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuning import Space, choose
from ._launch import Config, cdiv, launch

SHARES = 32


@dataclass(frozen=True, kw_only=True)
class Strip(Config):
    rows: int
    block_c: int


@dataclass(frozen=True, kw_only=True)
class Columns(Config):
    block_c: int


STRIPS: dict[str, tuple[int, ...]] = {"rows": (16, 32, 64), "block_c": (32, 64, 128), "threads": (64, 128, 256)}
SHARE_MOMENTS = Space("triton.batch_statistics.share_moments", **STRIPS)
MERGE_SHARES = Space("triton.batch_statistics.merge_shares", block_c=(256, 512))
MAP_ROWS = Space("triton.batch_statistics.map_rows", **STRIPS)


@triton.jit
def _merge(count, mean, second, more, more_mean, more_second):
    """Moments of two groups of tokens, the second of which may be empty."""
    total = count + more
    share = more / tl.maximum(total, 1.0)
    apart = more_mean - mean
    return total, mean + apart * share, second + more_second + apart * apart * count * share


@triton.jit(do_not_specialize=["tokens", "length"])
def share_moments(x, moments, tokens, length, C: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """``moments[share, 2, C]``: mean and squared distances of tokens ``[share * length, (share + 1) * length)``."""
    strips: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    share = (tl.program_id(0) // strips).to(tl.int64)
    c = tl.program_id(0) % strips * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    count = 0.0
    mean = tl.zeros([1, BLOCK_C], tl.float32)
    second = tl.zeros([1, BLOCK_C], tl.float32)
    end = tl.minimum((share + 1) * length, tokens)
    for first in tl.range(share * length, end, ROWS, num_stages=2):
        row = first + tl.arange(0, ROWS)[:, None]
        inside = (row < end) & (c < C)
        value = tl.load(x + row * C + c, mask=inside, other=0.0).to(tl.float32)
        more = tl.minimum(end - first, ROWS).to(tl.float32)
        tile_mean = tl.sum(value, 0, keep_dims=True) / more
        apart = tl.where(inside, value - tile_mean, 0.0)
        count, mean, second = _merge(count, mean, second, more, tile_mean, tl.sum(apart * apart, 0, keep_dims=True))
    to = moments + share * 2 * C + c
    tl.store(to, mean, mask=c < C)
    tl.store(to + C, second, mask=c < C)


@triton.jit(do_not_specialize=["tokens", "length", "shares"])
def merge_shares(moments, result, tokens, length, shares, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """``result[2, C]``: mean and biased variance of all tokens."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    count = 0.0
    mean = tl.zeros([BLOCK_C], tl.float32)
    second = tl.zeros([BLOCK_C], tl.float32)
    for share in range(shares):
        more = tl.minimum(tokens - share * length, length).to(tl.float32)
        from_ = moments + share * 2 * C + c
        count, mean, second = _merge(count, mean, second, more, tl.load(from_, mask=c < C, other=0.0),
                                     tl.load(from_ + C, mask=c < C, other=0.0))
    tl.store(result + c, mean, mask=c < C)
    tl.store(result + C + c, second / count, mask=c < C)


@triton.jit(do_not_specialize=["tokens"])
def map_rows(x, slope, offset, y, tokens, C: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """``y = x * slope + offset``, tokens ``[tokens, C]``."""
    strips: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    row = (tl.program_id(0) // strips).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.program_id(0) % strips * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    inside = (row < tokens) & (c < C)
    value = tl.load(x + row * C + c, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(slope + c, mask=c < C, other=0.0)
    shift = tl.load(offset + c, mask=c < C, other=0.0)
    tl.store(y + row * C + c, (value * scale + shift).to(y.dtype.element_ty), mask=inside)


def strip(x: Tensor) -> Strip:
    """256 bytes of channels by 32 tokens: two vectors of 16 bytes a thread and tile, or more in float32."""
    return Strip(rows=32, block_c=256 // x.element_size())


def statistics(x: Tensor) -> Tensor:
    """Mean over biased variance, float32 ``[2, C]``, of contiguous tokens ``[tokens, C]``."""
    tokens, channels = x.shape
    config = choose(SHARE_MOMENTS, strip(x), x, C=channels)
    length = cdiv(cdiv(tokens, SHARES), config.rows) * config.rows
    shares = cdiv(tokens, length)
    moments = torch.empty(shares, 2, channels, dtype=torch.float32, device=x.device)
    result = torch.empty(2, channels, dtype=torch.float32, device=x.device)
    launch(share_moments, shares * cdiv(channels, config.block_c), config, x=x, moments=moments, tokens=tokens,
           length=length, C=channels)
    columns = choose(MERGE_SHARES, Columns(block_c=256, threads=64), moments, C=channels)
    launch(merge_shares, cdiv(channels, columns.block_c), columns, moments=moments, result=result,
           tokens=tokens, length=length, shares=shares, C=channels)
    return result


def affine(x: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    """``x * slope + offset`` in the dtype of ``x [tokens, C]``, float32 ``[C]`` each."""
    tokens, channels = x.shape
    config, y = choose(MAP_ROWS, strip(x), x, C=channels), torch.empty_like(x)
    programs = cdiv(tokens, config.rows) * cdiv(channels, config.block_c)
    launch(map_rows, programs, config, x=x, slope=slope, offset=offset, y=y, tokens=tokens, C=channels)
    return y
