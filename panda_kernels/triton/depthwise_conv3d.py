"""Depthwise 3-D convolution of channels-last tokens: a stencil, and its weight gradient.

The floor is memory: each token read once and written once, 27 multiply-adds an element in between. What has to be
kept down is therefore the number of instructions around them. A thread owns 16 bytes of channels at one image column
and several image rows of one frame; for one input frame at a time it holds that frame's kh * kw taps in registers and
rolls down the rows, so that a loaded vector (kw shifted loads a row) serves kh output rows, and every load is 16
bytes. 3x3x3 with four rows: 13.5 loads an output vector instead of 27, the rest coming out of the caches.

The gradient of the tokens is the same stencil with mirrored taps. That of the weight keeps kh * kw sums in registers
instead of taps; every program writes float32 partial sums for a fixed share of the tokens.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuning import Space, choose
from ._launch import Config, cdiv, launch

MAX_TAPS = 80  # in a thread's registers, next to its sums and the loads on their way
SEGMENTS = 16  # shares of the tokens in the weight gradient: 768 programs with 1024 channels


@dataclass(frozen=True, kw_only=True)
class Tile(Config):
    rows: int
    block_w: int
    block_c: int


def tile(x: Tensor, kernel: tuple[int, ...]) -> Tile:
    """128 bytes of channels by 16 columns: 16 bytes a thread, less where the taps or single channels need registers."""
    block_w, block_c = 16, 128 // x.element_size()
    threads = 128 if x.shape[-1] * x.element_size() % 16 == 0 else 256
    while kernel[1] * kernel[2] * block_w * block_c // threads > MAX_TAPS and threads < 512:
        threads *= 2
    return Tile(rows=4, block_w=block_w, block_c=block_c, threads=threads)


STENCIL = Space("triton.depthwise_conv3d.stencil", rows=(2, 4, 8), block_w=(8, 16, 32), threads=(128, 256, 512))
WEIGHT_GRADIENT = Space("triton.depthwise_conv3d.weight_gradient", rows=(2, 4, 8), block_w=(8, 16, 32),
                        threads=(128, 256, 512))


def tuned(space: Space, x: Tensor, kernel: tuple[int, ...]) -> Tile:
    return choose(space, tile(x, kernel), x, C=x.shape[-1], kernel="x".join(map(str, kernel)))


@triton.jit
def _add(sums, i: tl.constexpr, value):
    """The tuple ``sums`` with ``value`` added to its element ``i``."""
    return sums[:i] + (sums[i] + value,) + sums[i + 1:]  # noqa: RUF005 - Triton knows no other way


@triton.jit
def _place(tile, H, W, ROWS: tl.constexpr, BLOCK_W: tl.constexpr):
    """Frame, first row and columns of a tile."""
    w_tiles = tl.cdiv(W, BLOCK_W)
    h_tiles = tl.cdiv(H, ROWS)
    w = tile % w_tiles * BLOCK_W + tl.arange(0, BLOCK_W)[:, None]
    return tile // w_tiles // h_tiles, tile // w_tiles % h_tiles * ROWS, w


@triton.jit
def _tokens(x, frame, h, w, c, dw: tl.constexpr, H, W, C: tl.constexpr):
    """Float32 tokens ``[w + dw, c]`` of row ``h`` of a frame, zero outside its ``H x W``.

    The address is a row's, plus a tile's, plus a constant: what the compiler shares between rows and columns.
    """
    row = x + (frame.to(tl.int64) * H + h) * W * C
    inside = (h >= 0) & (h < H) & ((w + dw >= 0) & (w + dw < W) & (c < C))
    return tl.load(row + (w.to(tl.int64) * C + c) + dw * C, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["T", "H", "W"])
def stencil(x, taps, bias, y, dense, total, T, H, W, C: tl.constexpr, KT: tl.constexpr, KH: tl.constexpr,
            KW: tl.constexpr, MIRRORED: tl.constexpr, RESIDUAL: tl.constexpr, DENSE_WIDTH: tl.constexpr,
            ROWS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr):
    """``y = bias + taps * x (+ x)``; taps ``[KT * KH * KW, C]``, in reverse order if ``MIRRORED``.

    With ``dense[tokens, DENSE_WIDTH]`` there is a second result, ``total = y + dense``.
    """
    pid = tl.program_id(0)
    C_TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    c = pid % C_TILES * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    frame, h0, w = _place(pid // C_TILES, H, W, ROWS, BLOCK_W)
    t = frame % T
    # Parameters are loaded as whole tiles, out of the caches: one row of them would have to change its layout.
    everywhere = c + tl.zeros([BLOCK_W, 1], tl.int32)

    sums = (tl.zeros([BLOCK_W, BLOCK_C], tl.float32),) * ROWS
    for dt in range(tl.maximum(KT // 2 - t, 0), tl.minimum(T + KT // 2 - t, KT)):
        frame_taps = taps + everywhere + (KT - 1 - dt if MIRRORED else dt) * KH * KW * C
        tap = ()
        for k in tl.static_range(KH * KW):
            row = frame_taps + (KH * KW - 1 - k if MIRRORED else k) * C
            value = tl.load(row, mask=everywhere < C, other=0.0).to(tl.float32)
            if RESIDUAL and k == KH * KW // 2:
                value += tl.where(dt == KT // 2, 1.0, 0.0)
            tap += (value,)
        for i in tl.static_range(ROWS + KH - 1):
            for dw in tl.static_range(KW):
                tokens = _tokens(x, frame + dt - KT // 2, h0 + i - KH // 2, w, c, dw - KW // 2, H, W, C)
                for dh in tl.static_range(KH):
                    if i >= dh and i - dh < ROWS:
                        sums = _add(sums, i - dh, tap[dh * KW + dw] * tokens)
    offset = tl.zeros([BLOCK_W, BLOCK_C], tl.float32)
    if bias is not None:
        offset += tl.load(bias + everywhere, mask=everywhere < C, other=0.0).to(tl.float32)
    for i in tl.static_range(ROWS):
        row = y + (frame.to(tl.int64) * H + h0 + i) * W * C
        inside = (w < W) & (c < C) & (h0 + i < H)
        value = sums[i] + offset
        tl.store(row + (w.to(tl.int64) * C + c), value.to(y.dtype.element_ty), mask=inside)
        if dense is not None:
            pixel = (frame.to(tl.int64) * H + h0 + i) * W
            other = dense + pixel * DENSE_WIDTH + (w.to(tl.int64) * DENSE_WIDTH + c)
            value += tl.load(other, mask=inside, other=0.0).to(tl.float32)
            tl.store(total + pixel * C + (w.to(tl.int64) * C + c), value.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T", "H", "W", "num_tiles", "share"])
def weight_gradient(grad, x, partial, T, H, W, num_tiles, share, C: tl.constexpr, KT: tl.constexpr, KH: tl.constexpr,
                    KW: tl.constexpr, ROWS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr):
    """One frame offset's sums over ``share`` tiles: ``partial[segment, KT * KH * KW + 1, C]``, the bias last."""
    pid = tl.program_id(0)
    C_TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    c = pid % C_TILES * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    dt = pid // C_TILES % KT
    segment = pid // C_TILES // KT
    none = tl.zeros([BLOCK_W, BLOCK_C], tl.float32)
    sums = (none,) * (KH * KW)
    total = none
    for tile in range(segment * share, tl.minimum((segment + 1) * share, num_tiles)):
        frame, h0, w = _place(tile, H, W, ROWS, BLOCK_W)
        t = frame % T + dt - KT // 2
        rows = tl.where((t >= 0) & (t < T), H, 0)  # a frame outside the clip has none
        outer = ()
        for i in tl.static_range(ROWS):
            outer += (_tokens(grad, frame, h0 + i, w, c, 0, H, W, C),)
            total += outer[i]
        for i in tl.static_range(ROWS + KH - 1):
            for dw in tl.static_range(KW):
                h = h0 + i - KH // 2
                tokens = _tokens(x, frame + dt - KT // 2, h, w, c, dw - KW // 2, rows, W, C)
                for dh in tl.static_range(KH):
                    if i >= dh and i - dh < ROWS:
                        sums = _add(sums, dh * KW + dw, outer[i - dh] * tokens)
    here = partial + (segment * (KT * KH * KW + 1) + dt * KH * KW).to(tl.int64) * C + c
    for k in tl.static_range(KH * KW):
        tl.store(here + k * C, tl.sum(sums[k], axis=0, keep_dims=True), mask=c < C)
    if dt == KT - 1:
        tl.store(here + KH * KW * C, tl.sum(total, axis=0, keep_dims=True), mask=c < C)


def convolve(x: Tensor, taps: Tensor, bias: Tensor | None, kernel: tuple[int, ...], *, mirrored: bool,
             residual: bool) -> Tensor:
    """The stencil of contiguous ``x[B, T, h, w, C]`` with ``taps[kt * kh * kw, C]``."""
    y = torch.empty_like(x)
    _start(x, taps, bias, kernel, y, None, None, mirrored, residual)
    return y


def convolve_and_add(x: Tensor, taps: Tensor, bias: Tensor, kernel: tuple[int, ...],
                     dense: Tensor) -> tuple[Tensor, Tensor]:
    """The stencil with its residual, and the sum of that and ``dense``: a read and a write more, where an addition of
    its own would read twice and write once. ``dense`` has the tokens of x in rows, which may be those of a wider
    matrix."""
    y, total = torch.empty_like(x), torch.empty_like(x)
    _start(x, taps, bias, kernel, y, dense, total, False, True)
    return y, total


def _start(x: Tensor, taps: Tensor, bias: Tensor | None, kernel: tuple[int, ...], y: Tensor, dense: Tensor | None,
           total: Tensor | None, mirrored: bool, residual: bool) -> None:
    B, T, H, W, C = x.shape
    config = tuned(STENCIL, x, kernel)
    grid = B * T * cdiv(H, config.rows) * cdiv(W, config.block_w) * cdiv(C, config.block_c)
    launch(stencil, grid, config, x=x, taps=taps, bias=bias, y=y, dense=dense, total=total, T=T, H=H, W=W, C=C,
           KT=kernel[0], KH=kernel[1], KW=kernel[2], MIRRORED=mirrored, RESIDUAL=residual,
           DENSE_WIDTH=0 if dense is None else dense.stride(0))


def parameter_gradients(grad: Tensor, x: Tensor, kernel: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Float32 gradients of the taps, ``[kt * kh * kw, C]``, and of the bias, ``[C]``, from contiguous tensors."""
    B, T, H, W, C = x.shape
    config = tuned(WEIGHT_GRADIENT, x, kernel)
    num_tiles = B * T * cdiv(H, config.rows) * cdiv(W, config.block_w)
    share = cdiv(num_tiles, SEGMENTS)
    segments = cdiv(num_tiles, share)
    num_taps = kernel[0] * kernel[1] * kernel[2]
    partial = torch.empty(segments, num_taps + 1, C, dtype=torch.float32, device=x.device)
    launch(weight_gradient, segments * kernel[0] * cdiv(C, config.block_c), config, grad=grad, x=x,
           partial=partial, T=T, H=H, W=W, num_tiles=num_tiles, share=share, C=C, KT=kernel[0], KH=kernel[1],
           KW=kernel[2])
    sums = partial.sum(0)
    return sums[:-1], sums[-1]
