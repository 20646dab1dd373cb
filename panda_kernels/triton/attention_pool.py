"""Attention pooling: a few queries over the normalised tokens of each sample.

The floor is memory: each token read once; the ``4 n C`` operations a token are little to tensor cores, but as FMAs
would take as long as the reading.

A program takes 32 tokens, so that a clip of 4096 has 128 programs: channel block by channel block their statistics and
logits, ``(u . x - mu sum(u)) / sigma``, then the blocks again, out of L2, for the pool. A tile that stays on chip
compiles too, but takes 135 KB of shared memory on sm_90 and 255 registers on sm_80: one program a multiprocessor, which
loads, then computes. Two readings take 64 registers and 38 KB, are pipelined, and waste little where C is no power of
two. The pieces' pools go to a workspace, and :func:`combine` joins each sample's in order. What a piece covers depends
on its own sample alone.

A product has 16 columns at least, and eight queries are usual: of the weights, which are float32, half of the columns
hold what the tokens' dtype can, the others the remainder.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuning import Space, choose
from ._launch import Config, cdiv, launch, next_power_of_2
from ._precision import input_precision


@dataclass(frozen=True, kw_only=True)
class Tile(Config):
    block_l: int
    block_c: int


@dataclass(frozen=True, kw_only=True)
class Join(Config):
    block_s: int
    block_c: int


POOL_PIECES = Space("triton.attention_pool.pool_pieces", block_l=(32, 64), block_c=(64, 128, 256), threads=(128, 256),
                    num_stages=(2, 3, 4))
COMBINE = Space("triton.attention_pool.combine", block_s=(32, 64, 128), block_c=(32, 64, 128), threads=(128, 256))


@triton.jit
def slots_of(cu_seqlens, sample, N, LENGTH: tl.constexpr):
    """First slot and number of slots of a sample whose tokens are cut into pieces of ``LENGTH``.

    Packed samples leave gaps, so that both follow from the sample's own offsets: from one sample to the next,
    ``offset // LENGTH + sample`` rises by no less than the pieces needed.
    """
    if cu_seqlens is None:
        count = tl.cdiv(N, LENGTH)
        first = sample * count
    else:
        begin = tl.load(cu_seqlens + sample)
        first = begin // LENGTH + sample
        count = tl.cdiv(tl.load(cu_seqlens + sample + 1) - begin, LENGTH)
    return first, count


@triton.jit
def piece_of(cu_seqlens, slot, S, N, LENGTH: tl.constexpr):
    """Sample of a slot, its first token and the token after its last: none in a slot that no sample uses."""
    if cu_seqlens is None:
        count = tl.cdiv(N, LENGTH)
        sample = slot // count
        start = sample.to(tl.int64) * N
        end = start + N
        begin = start + slot % count * LENGTH
    else:
        sample = -1
        for s0 in range(0, S, 128):
            s = s0 + tl.arange(0, 128)
            first = tl.load(cu_seqlens + s, mask=s < S, other=0) // LENGTH + s
            sample += tl.sum(tl.where((s < S) & (first <= slot), 1, 0))
        start = tl.load(cu_seqlens + sample).to(tl.int64)
        end = tl.load(cu_seqlens + sample + 1).to(tl.int64)
        begin = start + (slot - start // LENGTH - sample) * LENGTH
    return sample, begin, tl.minimum(begin + LENGTH, end)


@triton.jit
def split(weights, column, H: tl.constexpr, dtype: tl.constexpr):
    """Rounded weights in the first ``H`` columns, what rounding took from them in the others; and their unit."""
    unit = 1.0
    if dtype == tl.float16:  # has no numbers as small as a weight among thousands
        unit = tl.maximum(tl.max(tl.abs(weights)), 1e-30)
        weights /= unit
    rounded = weights.to(dtype)
    return tl.where(column < H, rounded, (weights - rounded.to(tl.float32)).to(dtype)), unit


@triton.jit
def fold(sums, H: tl.constexpr):
    """Columns of rounded weights and of what rounding took from them, added: ``[..., H]``."""
    return tl.sum(tl.reshape(sums, [sums.shape[0], sums.shape[1] // H, H]), axis=1)


@triton.jit
def rows_of(vectors, row, c, n, C: tl.constexpr):
    """``[row, c]`` of ``vectors[n, C]``, zero beyond either."""
    return tl.load(vectors + row * C + c, mask=(row < n) & (c < C), other=0.0)


@triton.jit
def scan(x, token, end, a, b, row, n, eps, C: tl.constexpr, PRECISION: tl.constexpr, BLOCK_C: tl.constexpr):
    """One reading of tokens: mean, 1 / deviation, products of ``xhat`` with the rows of ``a`` and ``b``, sums of rows.

    The sums are taken about the token's first channel, which is within sqrt(C) deviations of the mean, so that squares
    of tokens far from zero do not cancel.
    """
    tokens = x + token * C
    inside = token < end
    shift = tl.load(tokens, mask=inside, other=0.0).to(tl.float32)
    sums = tl.zeros_like(shift)
    squares = tl.zeros_like(shift)
    product_a = tl.zeros([token.shape[0], row.shape[0]], tl.float32)
    product_b = product_a
    sums_a = tl.zeros([row.shape[0], BLOCK_C], tl.float32)
    sums_b = sums_a
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)[None, :]
        values = tl.load(tokens + c, mask=inside & (c < C), other=0.0)
        rows_a = rows_of(a, row, c, n, C)
        product_a = tl.dot(values, tl.trans(rows_a), product_a, input_precision=PRECISION)
        sums_a += rows_a.to(tl.float32)
        if b is not None:
            rows_b = rows_of(b, row, c, n, C)
            product_b = tl.dot(values, tl.trans(rows_b), product_b, input_precision=PRECISION)
            sums_b += rows_b.to(tl.float32)
        distance = tl.where(c < C, values.to(tl.float32) - shift, 0.0)
        sums += tl.sum(distance, axis=1, keep_dims=True)
        squares += tl.sum(distance * distance, axis=1, keep_dims=True)
    mean = shift + sums / C
    variance = squares / C - (sums / C) * (sums / C)
    rstd = 1.0 / tl.sqrt_rn(tl.where(variance < 0.0, 0.0, variance) + eps)  # tl.maximum would lose a NaN
    total_a = tl.trans(tl.sum(sums_a, axis=1, keep_dims=True))
    total_b = tl.trans(tl.sum(sums_b, axis=1, keep_dims=True))
    return (mean, rstd, (product_a - mean * total_a) * rstd, (product_b - mean * total_b) * rstd, total_a, total_b)


@triton.jit(do_not_specialize=["S", "N", "eps"])
def pool_pieces(x, queries, cu_seqlens, values, state, S, N, eps, n: tl.constexpr, C: tl.constexpr, H: tl.constexpr,
                COLUMNS: tl.constexpr, PER_SAMPLE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_L: tl.constexpr,
                BLOCK_C: tl.constexpr):
    """A piece's ``values[slot, n, C]``, relative to its largest logits and sums of weights, ``state[slot, 2, n]``."""
    slot = tl.program_id(0)
    sample, begin, end = piece_of(cu_seqlens, slot, S, N, BLOCK_L)
    if begin >= end:
        return
    if PER_SAMPLE:
        queries += sample.to(tl.int64) * n * C
    token = begin + tl.arange(0, BLOCK_L)[:, None]
    inside = token < end
    column = tl.arange(0, COLUMNS)[None, :]
    row = tl.arange(0, COLUMNS)[:, None] % H
    mean, rstd, logits, _, _, _ = scan(x, token, end, queries, None, row, n, eps, C, PRECISION, BLOCK_C)
    logits = tl.where(inside, logits, float("-inf"))
    peak = tl.max(logits, axis=0, keep_dims=True)
    weights = tl.exp(logits - peak)
    here = state + slot.to(tl.int64) * 2 * n + column
    tl.store(here, peak, mask=column < n)
    tl.store(here + n, tl.sum(weights, axis=0, keep_dims=True), mask=column < n)

    weights, unit = split(tl.where(inside, weights * rstd, 0.0), column, H, x.dtype.element_ty)
    # From the weights as they were rounded: what a token's mean adds then cancels to the last bit.
    offset = tl.sum(weights.to(tl.float32) * mean, axis=0, keep_dims=True)
    head = tl.arange(0, H)[None, :]
    here = values + (slot.to(tl.int64) * n + head) * C
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        again = tl.load(x + token * C + c[None, :], mask=inside & (c[None, :] < C), other=0.0)
        pooled = tl.dot(tl.trans(again), weights, input_precision=PRECISION) - offset
        tl.store(here + c[:, None], fold(pooled * unit, H), mask=(head < n) & (c[:, None] < C))


@triton.jit(do_not_specialize=["N"])
def combine(values, state, cu_seqlens, out, N, n: tl.constexpr, C: tl.constexpr, LENGTH: tl.constexpr,
            BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sum of ``values[slot, n, C]`` over each sample's slots, softmaxes joined by ``state``: ``out[sample, n, C]``."""
    pid = tl.program_id(0)
    C_TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    c = pid % C_TILES * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    head = pid // C_TILES % n
    sample = pid // C_TILES // n
    first, count = slots_of(cu_seqlens, sample, N, LENGTH)
    own = tl.arange(0, BLOCK_S)
    sums = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    norms = tl.zeros([BLOCK_S], tl.float32)
    peak = float("-inf")
    for i in range(0, count, BLOCK_S):
        slot = (first + i + own).to(tl.int64)
        inside = i + own < count
        found = tl.load(values + (slot * n + head)[:, None] * C + c, mask=inside[:, None] & (c < C), other=0.0)
        if state is not None:
            peaks = tl.load(state + slot * 2 * n + head, mask=inside, other=float("-inf"))
            higher = tl.maximum(peak, tl.max(peaks, axis=0))
            weight = tl.exp(peaks - higher)
            norms = norms * tl.exp(peak - higher) + weight * tl.load(state + slot * 2 * n + n + head, mask=inside,
                                                                     other=0.0)
            sums = sums * tl.exp(peak - higher) + weight[:, None] * found
            peak = higher
        else:
            sums += found
    total = tl.sum(sums, axis=0, keep_dims=True)
    if state is not None:
        total = tl.where(count > 0, total / tl.sum(norms, axis=0), 0.0)
    tl.store(out + (sample.to(tl.int64) * n + head) * C + c, total.to(out.dtype.element_ty), mask=c < C)


def sizes_of(x: Tensor, cu_seqlens: Tensor | None) -> dict[str, int]:
    """Samples, and the tokens of each where they all have the same number."""
    return {"S": x.shape[0], "N": x.shape[1]} if cu_seqlens is None else {"S": cu_seqlens.shape[0] - 1, "N": 0}


def num_slots(x: Tensor, cu_seqlens: Tensor | None, length: int) -> int:
    """How many pieces there can be; of packed samples the host does not know the lengths."""
    sizes = sizes_of(x, cu_seqlens)
    return sizes["S"] * cdiv(sizes["N"], length) if cu_seqlens is None else x.shape[0] // length + sizes["S"]


def constants_of(x: Tensor, queries: Tensor) -> dict[str, Any]:
    """What the kernels take from the queries' shape and the dtype; float32 needs no second column for a query."""
    n, C = queries.shape[-2:]
    H = max(8, next_power_of_2(n))
    return {"n": n, "C": C, "H": H, "COLUMNS": H if x.dtype == torch.float32 else 2 * H,
            "PER_SAMPLE": queries.ndim == 3, "PRECISION": input_precision(x.dtype)}


def combined(values: Tensor, state: Tensor | None, cu_seqlens: Tensor | None, sizes: dict[str, int], length: int,
              dtype: torch.dtype) -> Tensor:
    """``[slots, n, C]`` -> ``[S, n, C]``."""
    _, n, C = values.shape
    config = choose(COMBINE, Join(block_s=128, block_c=32), values, n=n, C=C)
    out = torch.empty(sizes["S"], n, C, dtype=dtype, device=values.device)
    launch(combine, sizes["S"] * n * cdiv(C, config.block_c), config, values=values, state=state,
           cu_seqlens=cu_seqlens, out=out, N=sizes["N"], n=n, C=C, LENGTH=length)
    return out


def pool_tile(dtype: torch.dtype) -> Tile:
    """Of :func:`pool_pieces`. Triton 3.6 spills exact float32 for sm_90 in more than two stages."""
    return Tile(block_l=32, block_c=128, threads=256, num_stages=2 if dtype == torch.float32 else 4)


def pool(x: Tensor, queries: Tensor, cu_seqlens: Tensor | None, eps: float,
         dtype: torch.dtype | None = None) -> Tensor:
    """``[S, n, C]`` from contiguous ``x``, ``[S, N, C]`` or packed ``[total, C]``, and ``queries``; in ``x``'s dtype
    or another."""
    (n, C), sizes = queries.shape[-2:], sizes_of(x, cu_seqlens)
    config = choose(POOL_PIECES, pool_tile(x.dtype), x, n=n, C=C)
    slots = num_slots(x, cu_seqlens, config.block_l)
    values = torch.empty(slots, n, C, dtype=torch.float32, device=x.device)
    state = torch.empty(slots, 2, n, dtype=torch.float32, device=x.device)
    launch(pool_pieces, slots, config, x=x, queries=queries, cu_seqlens=cu_seqlens, values=values, state=state, eps=eps,
           **sizes, **constants_of(x, queries))
    return combined(values, state, cu_seqlens, sizes, config.block_l, dtype or x.dtype)
