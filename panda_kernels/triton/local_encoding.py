"""LSTE's bottleneck: a product down, three taps over time in its epilogue, a product up with the residual in its own.

The floor is arithmetic, 4 * C * R operations a token; memory adds x, the bottleneck and x1 once each. A program takes
64 image positions in all frames of a chunk and 64 bottleneck channels, so that a thread holds the same position and
channel of every frame: the temporal convolution is a few multiply-adds between accumulators, done once an element
and in float32. As the second product's operand it would be done anew for every tile of columns and keep the tensor
cores waiting. Backward, the mirrored convolution and its taps' gradient leave the product with W2 in the same way.

The bottleneck (682 for C = 1024) is stored with rows of a multiple of 16 bytes, zeros at their end; weights are read
along C. Clips of more than four frames are taken two frames a program, with one more computed on either side.

Where the product down is composed with the patch embedding (backends/triton/stab_tower.py) one plain product gives x0
and the bottleneck, and ``convolve_over_time`` is a pass of its own. ``quantise_over_time`` leaves e4m3 for a product in
FP8: a program then has whole rows, whose scales it needs, and the parameters of 1024 channels in its registers.
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
from .fp8 import store_quantised
from .matmul import accumulate


@dataclass(frozen=True, kw_only=True)
class Fold(Config):
    rows: int
    block_c: int


@dataclass(frozen=True, kw_only=True)
class Tile(Config):
    frames: int
    halo: int
    positions: int
    block_n: int
    block_k: int


@dataclass(frozen=True, kw_only=True)
class Pass(Config):
    positions: int
    block_n: int


def tile(dtype: torch.dtype, T: int) -> Tile:
    precise = dtype == torch.float32
    stages = 4 if not precise else 3 if T > 3 else 2  # of fewer frames, three spill for sm_80
    return Tile(frames=min(T, 4), halo=int(T > 4), positions=64, block_n=32 if precise else 64,
                block_k=16 if precise else 32, threads=128 if precise else 256, num_stages=stages)


TILES: dict[str, tuple[int, ...]] = {"positions": (32, 64, 128), "block_n": (32, 64, 128), "block_k": (16, 32, 64),
                                     "threads": (128, 256)}
DOWN = Space("triton.local_encoding.down", **TILES)
DOWN_GRADIENT = Space("triton.local_encoding.down_gradient", **TILES)
CONVOLVE = Space("triton.local_encoding.convolve_over_time", positions=(8, 16, 32), block_n=(32, 64),
                 threads=(64, 128, 256))
QUANTISE = Space("triton.local_encoding.quantise_over_time", positions=(1, 2, 4), threads=(128, 256, 512))
FOLD = Space("triton.local_encoding.fold", rows=(1, 2, 4, 8), threads=(128, 256))


@triton.jit(do_not_specialize=["R"])
def fold(w1, norm_scale, norm_shift, b1, wt, bt, weight, rows, R, C: tl.constexpr, WIDTH: tl.constexpr,
         ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """``weight[R, C] = w1 diag(norm_scale)`` and ``rows[5, WIDTH]``: ``b1 + w1 norm_shift``, three taps, ``bt``."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    shift = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)[None, :]
        inside = (r < R) & (c < C)
        row = tl.load(w1 + r * C + c, mask=inside, other=0.0).to(tl.float32)
        shift += row * tl.load(norm_shift + c, mask=c < C, other=0.0).to(tl.float32)
        row *= tl.load(norm_scale + c, mask=c < C, other=0.0).to(tl.float32)
        tl.store(weight + r * C + c, row.to(weight.dtype.element_ty), mask=inside)
    bias = tl.load(b1 + r, mask=r < R, other=0.0).to(tl.float32) + tl.sum(shift, axis=1, keep_dims=True)
    tl.store(rows + r, tl.where(r < R, bias, 0.0), mask=r < WIDTH)
    for k in tl.static_range(3):
        tap = tl.load(wt + r * 3 + k, mask=r < R, other=0.0).to(tl.float32)
        tl.store(rows + (k + 1) * WIDTH + r, tap, mask=r < WIDTH)
    tl.store(rows + 4 * WIDTH + r, tl.load(bt + r, mask=r < R, other=0.0).to(tl.float32), mask=r < WIDTH)


@triton.jit
def _place(tile, num_positions, T, P, FRAMES: tl.constexpr, HALO: tl.constexpr, POSITIONS: tl.constexpr):
    """A program's positions: their rows in frame 0 of ``[B, T, P]``, which there are, and the first frame."""
    tiles = tl.cdiv(num_positions, POSITIONS)
    position = tile % tiles * POSITIONS + tl.arange(0, POSITIONS)[:, None]
    row = position.to(tl.int64) + (position // P).to(tl.int64) * (T - 1) * P
    return row, position < num_positions, tile // tiles * (FRAMES - 2 * HALO) - HALO


@triton.jit
def _frame_products(a, row, inside, first, T, P, weight, n, C: tl.constexpr, R: tl.constexpr,
                    FRAMES: tl.constexpr, HALO: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):
    """The products with ``weight[R, C]`` of ``FRAMES`` frames; outside the clip those of its nearest frame."""
    offsets = ()
    for i in tl.static_range(FRAMES):
        offsets += ((tl.minimum(tl.maximum(first + i, 0), T - 1) if HALO else i) * P.to(tl.int64),)
    return accumulate(a, row, inside, offsets, weight, n, C, R, C, 1, C, BLOCK_K, PRECISION)


@triton.jit
def _in_clip(value, t, T, HALO: tl.constexpr):
    """Zero where frame ``t`` is outside the clip, which without a halo it cannot be."""
    return tl.where((t >= 0) & (t < T), value, 0.0) if HALO else value


@triton.jit
def _store(x, row, inside, n, value, R: tl.constexpr, WIDTH: tl.constexpr):
    """Zeros beyond ``R`` also where a row's NaN would make them NaN."""
    tl.store(x + (row * WIDTH + n), tl.where(n < R, value, 0.0).to(x.dtype.element_ty), mask=inside & (n < WIDTH))


@triton.jit
def _row(rows, i: tl.constexpr, n, WIDTH: tl.constexpr):
    return tl.load(rows + i * WIDTH + n, mask=n < WIDTH, other=0.0)


@triton.jit
def _over_time(values, i: tl.constexpr, before, at, after):
    """Frame ``i`` of the convolution of the tuple ``values`` with three taps; nothing lies beyond its ends."""
    result = at * values[i]
    if i > 0:
        result += before * values[i - 1]
    if i + 1 < len(values):
        result += after * values[i + 1]
    return result


@triton.jit(do_not_specialize=["num_positions", "T", "P"])
def down(x, weight, rows, inner, over_time, num_positions, T, P, C: tl.constexpr, R: tl.constexpr,
         WIDTH: tl.constexpr, PRECISION: tl.constexpr, FRAMES: tl.constexpr, HALO: tl.constexpr,
         POSITIONS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """``inner = x weight^T + rows[0]``, if asked for, and its temporal convolution, ``[B * T * P, WIDTH]``."""
    pid = tl.program_id(0)
    N_TILES: tl.constexpr = (R + BLOCK_N - 1) // BLOCK_N
    row, inside, first = _place(pid // N_TILES, num_positions, T, P, FRAMES, HALO, POSITIONS)
    n = pid % N_TILES * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    sums = _frame_products(x, row, inside, first, T, P, weight, n, C, R, FRAMES, HALO, BLOCK_K, PRECISION)
    offset, offset_over_time = _row(rows, 0, n, WIDTH), _row(rows, 4, n, WIDTH)
    before, at, after = _row(rows, 1, n, WIDTH), _row(rows, 2, n, WIDTH), _row(rows, 3, n, WIDTH)
    values = ()
    for i in tl.static_range(FRAMES):
        values += (_in_clip(sums[i] + offset, first + i, T, HALO),)
    for i in tl.static_range(HALO, FRAMES - HALO):
        there = inside & (first + i < T)
        here = row + (first + i) * P.to(tl.int64)
        if inner is not None:
            _store(inner, here, there, n, values[i], R, WIDTH)
        _store(over_time, here, there, n, _over_time(values, i, before, at, after) + offset_over_time, R, WIDTH)


@triton.jit
def _pass(inner, rows, over_time, scales, tile, n0, num_positions, T, P, INNER_WIDTH: tl.constexpr,
          WIDTH: tl.constexpr, POSITIONS: tl.constexpr, BLOCK_N: tl.constexpr):
    """The temporal convolution of a tile of positions and the channels from ``n0`` on, quantised if it has scales."""
    # Parameters are loaded as whole tiles, out of the caches: one row of them would have to change its layout.
    n = n0 + tl.arange(0, BLOCK_N)[None, :] + tl.zeros([POSITIONS, 1], tl.int32)
    row, exists, _ = _place(tile, num_positions, T, P, 1, 0, POSITIONS)
    inside = exists & (n < WIDTH)
    offset, offset_over_time = _row(rows, 0, n, WIDTH), _row(rows, 4, n, WIDTH)
    before, at, after = _row(rows, 1, n, WIDTH), _row(rows, 2, n, WIDTH), _row(rows, 3, n, WIDTH)
    previous = tl.zeros([POSITIONS, BLOCK_N], tl.float32)
    current = tl.load(inner + row * INNER_WIDTH + n, mask=inside, other=0.0).to(tl.float32) + offset
    coming = tl.load(inner + (row + P) * INNER_WIDTH + n, mask=inside & (T > 1), other=0.0)
    for t in range(0, T):
        here = row + t * P.to(tl.int64)
        following = tl.where(t + 1 < T, coming.to(tl.float32) + offset, 0.0)
        # Two frames ahead, so that a row's scale is found meanwhile.
        coming = tl.load(inner + (here + 2 * P) * INNER_WIDTH + n, mask=inside & (t + 2 < T), other=0.0)
        result = before * previous + at * current + after * following + offset_over_time
        if scales is None:
            tl.store(over_time + here * WIDTH + n, result.to(over_time.dtype.element_ty), mask=inside)
        else:
            store_quantised(over_time, scales, here, exists, n, result, WIDTH)
        previous = current
        current = following


@triton.jit(do_not_specialize=["num_positions", "T", "P"])
def convolve_over_time(inner, rows, over_time, num_positions, T, P, INNER_WIDTH: tl.constexpr, WIDTH: tl.constexpr,
                       POSITIONS: tl.constexpr, BLOCK_N: tl.constexpr):
    """``over_time[B * T * P, WIDTH]``: the temporal convolution of ``inner[B * T * P, INNER_WIDTH] + rows[0]``.

    A thread has one vector of channels at one position and passes through the clip, so that each is read once.
    """
    N_TILES: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    n0 = tl.program_id(0) % N_TILES * BLOCK_N
    _pass(inner, rows, over_time, None, tl.program_id(0) // N_TILES, n0, num_positions, T, P, INNER_WIDTH, WIDTH,
          POSITIONS, BLOCK_N)


@triton.jit(do_not_specialize=["num_positions", "T", "P"])
def quantise_over_time(inner, rows, over_time, scales, num_positions, T, P, INNER_WIDTH: tl.constexpr,
                       WIDTH: tl.constexpr, POSITIONS: tl.constexpr, BLOCK_N: tl.constexpr):
    """The same in e4m3, with a scale a row (fp8.py); ``BLOCK_N`` channels are all."""
    _pass(inner, rows, over_time, scales, tl.program_id(0), 0, num_positions, T, P, INNER_WIDTH, WIDTH, POSITIONS,
          BLOCK_N)


@triton.jit(do_not_specialize=["num_positions", "T", "P"])
def down_gradient(grad, w2, rows, inner, grad_inner, partial, num_positions, T, P, C: tl.constexpr, R: tl.constexpr,
                  WIDTH: tl.constexpr, PRECISION: tl.constexpr, FRAMES: tl.constexpr, HALO: tl.constexpr,
                  POSITIONS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """From ``grad`` of x1 and ``w2[R, C]`` the gradient of ``inner``, and sums for those of the taps and their bias.

    ``partial[tile, 4, WIDTH]`` holds a program's share of them, in float32.
    """
    pid = tl.program_id(0)
    N_TILES: tl.constexpr = (R + BLOCK_N - 1) // BLOCK_N
    row, inside, first = _place(pid // N_TILES, num_positions, T, P, FRAMES, HALO, POSITIONS)
    n = pid % N_TILES * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    sums = _frame_products(grad, row, inside, first, T, P, w2, n, C, R, FRAMES, HALO, BLOCK_K, PRECISION)
    before, at, after = _row(rows, 1, n, WIDTH), _row(rows, 2, n, WIDTH), _row(rows, 3, n, WIDTH)
    outer = ()
    for i in tl.static_range(FRAMES):
        outer += (_in_clip(sums[i], first + i, T, HALO),)
    for i in tl.static_range(HALO, FRAMES - HALO):
        result = _over_time(outer, i, after, at, before)
        _store(grad_inner, row + (first + i) * P.to(tl.int64), inside & (first + i < T), n, result, R, WIDTH)
    share = partial + (pid // N_TILES).to(tl.int64) * 4 * WIDTH + n
    for k in tl.static_range(4):
        total = tl.zeros([POSITIONS, BLOCK_N], tl.float32)
        for i in tl.static_range(HALO, FRAMES - HALO):
            if k == 3:
                total += outer[i]
            elif i + k > 0 and i + k <= FRAMES:  # anew for each tap: registers do not hold all frames of it
                t = first + i + k - 1
                mask = inside & (n < WIDTH) & (t >= 0) & (t < T)
                other = tl.load(inner + ((row + t * P.to(tl.int64)) * WIDTH + n), mask=mask, other=0.0)
                total += outer[i] * other.to(tl.float32)
        tl.store(share + k * WIDTH, tl.sum(total, axis=0, keep_dims=True), mask=n < WIDTH)


def _padded(R: int, dtype: torch.dtype) -> int:
    return R + -R % (16 // dtype.itemsize)


def folded(w1: Tensor, b1: Tensor, norm_scale: Tensor, norm_shift: Tensor, wt: Tensor,
           bt: Tensor) -> tuple[Tensor, Tensor]:
    """``w1[R, C]`` with the norm's scale in it, and a channel's other parameters as the kernels read them."""
    R, C = w1.shape
    width = _padded(R, w1.dtype)
    weight, rows = torch.empty_like(w1), torch.empty(5, width, dtype=torch.float32, device=w1.device)
    config = choose(FOLD, Fold(rows=4, block_c=1024), w1, C=C, R=R)
    launch(fold, cdiv(width, config.rows), config, w1=w1, norm_scale=norm_scale, norm_shift=norm_shift, b1=b1,
           wt=wt, bt=bt, weight=weight, rows=rows, R=R, C=C, WIDTH=width)
    return weight, rows


def _sizes(x: Tensor, R: int, config: Tile) -> tuple[dict[str, int | str], int]:
    """The sizes both kernels take, and how many tiles of rows there are."""
    B, T, h, w, C = x.shape
    groups = cdiv(T, config.frames - 2 * config.halo)
    sizes = {"num_positions": B * h * w, "T": T, "P": h * w, "C": C, "R": R, "WIDTH": _padded(R, x.dtype)}
    return sizes | {"PRECISION": input_precision(x.dtype)}, cdiv(B * h * w, config.positions) * groups


def bottleneck(x: Tensor, weight: Tensor, rows: Tensor, *, keep_inner: bool) -> tuple[Tensor | None, Tensor]:
    """The bottleneck before (if kept) and after the temporal convolution, ``[tokens, R padded with zeros]``."""
    R, C = weight.shape
    config = choose(DOWN, tile(x.dtype, x.shape[1]), x, C=C, R=R)
    sizes, tiles = _sizes(x, R, config)
    over_time = torch.empty(x.shape[:-1].numel(), _padded(R, x.dtype), dtype=x.dtype, device=x.device)
    inner = torch.empty_like(over_time) if keep_inner else None
    launch(down, tiles * cdiv(R, config.block_n), config, x=x, weight=weight, rows=rows, inner=inner,
           over_time=over_time, **sizes)
    return inner, over_time


def over_time(inner: Tensor, rows: Tensor, frames: int, positions: int) -> Tensor:
    """The temporal convolution ``[tokens, width]`` of the bottleneck, ``[tokens, width]`` in rows of any stride.

    ``rows[5, width]`` is as :func:`folded` gives it, ``positions`` the tokens of each of a clip's ``frames``.
    """
    width, single = inner.shape[1], inner.dtype == torch.float32
    config = choose(CONVOLVE, Pass(positions=16, block_n=32 if single else 64), inner, width=width)
    result = torch.empty(inner.shape, dtype=inner.dtype, device=inner.device)
    _launch_pass(convolve_over_time, config, inner, frames, positions, rows=rows, over_time=result)
    return result


def quantised_over_time(inner: Tensor, rows: Tensor, frames: int, positions: int) -> tuple[Tensor, Tensor]:
    """:func:`over_time` rounded once, to e4m3 ``[tokens, width]``, with float32 scales ``[tokens, 1]``."""
    block = next_power_of_2(inner.shape[1])
    # Eight numbers a thread: the parameters of each and three frames fill its registers.
    config = choose(QUANTISE, Pass(positions=max(1, 2048 // block), block_n=block, threads=256), inner,
                    width=inner.shape[1])
    values = torch.empty(inner.shape, dtype=torch.float8_e4m3fn, device=inner.device)
    scales = torch.empty(len(inner), 1, dtype=torch.float32, device=inner.device)
    _launch_pass(quantise_over_time, config, inner, frames, positions, rows=rows, over_time=values, scales=scales)
    return values, scales


def _launch_pass(kernel: Any, config: Pass, inner: Tensor, frames: int, positions: int, **tensors: Tensor) -> None:
    width, num_positions = inner.shape[1], len(inner) // frames
    launch(kernel, cdiv(num_positions, config.positions) * cdiv(width, config.block_n), config, inner=inner, **tensors,
           num_positions=num_positions, T=frames, P=positions, INNER_WIDTH=inner.stride(0), WIDTH=width)


def bottleneck_gradient(grad: Tensor, w2: Tensor, rows: Tensor, inner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From ``grad`` of x1 and ``w2[R, C]`` the gradients of ``inner``, and in float32 of the taps and their bias."""
    R, C = w2.shape
    config = choose(DOWN_GRADIENT, tile(grad.dtype, grad.shape[1]), grad, C=C, R=R)
    sizes, tiles = _sizes(grad, R, config)
    grad_inner = torch.empty_like(inner)
    partial = torch.empty(tiles, 4, inner.shape[1], dtype=torch.float32, device=grad.device)
    launch(down_gradient, tiles * cdiv(R, config.block_n), config, grad=grad, w2=w2, rows=rows, inner=inner,
           grad_inner=grad_inner, partial=partial, **sizes)
    sums = partial.sum(0)[:, :R]
    return grad_inner, sums[:3].t(), sums[3]
