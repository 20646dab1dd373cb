"""Attention of each window's mean to the window's tokens, in the folded form (docs/numerics.md), forward and backward.

The floor is arithmetic, four products of C x C a window; memory sees ``SIDE ** 2`` token rows read and one written. In
``attend`` a program takes 64 windows and one or two heads. Chunk by chunk of channels it multiplies the folded query
``Wk_h^T q_h`` and meets it with the normalised tokens; after the softmax it walks over the chunks again, sums the
tokens and multiplies the sum by ``Wv_h`` at once. So ``[windows, heads, C]``, which would be written and read twice, is
only ever a chunk in registers. The price is tokens read twice a group of heads, out of L2.

``statistics`` goes before: where each window lies, found on the device, its mean, and the norms. The products with
``wq`` and ``wp`` are those of matmul.py. What belongs to a token of a window lies as ``[S, windows]``, so that programs
read whole lines. The gradient is in window_attention_pool_grad.py.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuning import Space, choose
from ._launch import Config, cdiv, launch, next_power_of_2
from ._precision import input_precision


@dataclass(frozen=True, kw_only=True)
class Rows(Config):
    rows: int
    block_c: int


@dataclass(frozen=True, kw_only=True)
class Tile(Config):
    block_w: int
    block_c: int
    block_d: int


def row_tile(C: int) -> Rows:
    """Whole rows, as many as leave a thread 32 numbers of one of them all."""
    block_c = max(next_power_of_2(C), 16)
    return Rows(rows=max(4096 // block_c, 1), block_c=block_c)


def head_block(D: int, dtype: torch.dtype) -> int:
    """Columns of a head in one product: those that waste least, and of these the most."""
    sizes = (16,) if dtype == torch.float32 else (128, 64, 32) if D > 16 else (16,)
    return min(sizes, key=lambda block: cdiv(D, block) * block)


def attend_tile(dtype: torch.dtype, D: int) -> Tile:
    """Chunks of 32 channels, as the sums over a head fill the registers; 64 spill on sm_80.

    Of heads wider than 128 (C = 1152 and 1408 with eight) so do 32, in one Triton or the other, and three
    products of 64 columns where two of 128 do not.
    """
    if dtype == torch.float32:  # without tensor cores, operands of a product lie in registers too
        return Tile(block_w=32, block_c=32, block_d=head_block(D, dtype), threads=256)
    return Tile(block_w=64, block_c=32 if D <= 128 else 16,
                block_d=head_block(D, dtype) if D <= 160 else 128, threads=256)


ROWS: dict[str, tuple[int, ...]] = {"rows": (1, 2, 4, 8), "threads": (128, 256)}
TILES: dict[str, tuple[int, ...]] = {"block_w": (32, 64, 128), "block_c": (32, 64), "threads": (128, 256)}
STATISTICS = Space("triton.window_attention_pool.statistics", **ROWS)
ATTEND = Space("triton.window_attention_pool.attend", **TILES)


def heads_together(dtype: torch.dtype, num_heads: int, D: int) -> int:
    """Heads of a program: two, where their sums fit, halve the reads of tokens."""
    return 2 if dtype != torch.float32 and num_heads % 2 == 0 and D <= 128 else 1


@triton.jit
def replaced(values, i: tl.constexpr, value):
    """The tuple with another element ``i``."""
    return values[:i] + (value,) + values[i + 1:]  # noqa: RUF005 - Triton knows no other way


@triton.jit
def _places(corners, window, frames, h, w, SIDE: tl.constexpr):
    """The first token, int64, of windows ``[n, 1]`` counted through all rectangles."""
    begin = tl.zeros([1, 1], tl.int32)
    place = tl.zeros([window.shape[0], 1], tl.int64)
    for first in range(0, frames, 64):
        frame = first + tl.arange(0, 64)[None, :]
        corner = corners + frame * 4
        here = frame < frames
        row = tl.load(corner, mask=here, other=0).to(tl.int32)
        rows = (tl.load(corner + 1, mask=here, other=0).to(tl.int32) - row) // SIDE
        col = tl.load(corner + 2, mask=here, other=0).to(tl.int32)
        across = (tl.load(corner + 3, mask=here, other=SIDE).to(tl.int32) - col) // SIDE
        end = begin + tl.cumsum(rows * across, axis=1)
        local = window - (end - rows * across)
        token = (frame.to(tl.int64) * h + row + local // across * SIDE) * w + col + local % across * SIDE
        place += tl.sum(tl.where((local >= 0) & (window < end), token, 0), axis=1, keep_dims=True)
        begin += tl.sum(rows * across, axis=1, keep_dims=True)
    return place


@triton.jit
def moments(x, c, C: tl.constexpr, eps):
    """Mean and reciprocal deviation of rows ``[n, BLOCK_C]`` that are zero beyond C."""
    mean = tl.sum(x, axis=1, keep_dims=True) / C
    centred = tl.where(c < C, x - mean, 0.0)
    return mean, tl.rsqrt(tl.sum(centred * centred, axis=1, keep_dims=True) / C + eps)


@triton.jit(do_not_specialize=["frames", "h", "w", "W", "eps"])
def statistics(x, corners, norm_weight, norm_bias, places, norms, mean, query_input, frames, h, w, W, eps,
               C: tl.constexpr, SIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Of each window: its first token, its tokens' means and reciprocal deviations, its mean, and LayerNorm of that."""
    window = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, BLOCK_C)[None, :] + tl.zeros([ROWS, 1], tl.int32)
    place = _places(corners, window, frames, h, w, SIDE)
    tl.store(places + window, place, mask=window < W)
    inside = (window < W) & (c < C)
    total = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for s in tl.static_range(SIDE * SIDE):
        token = place + s // SIDE * w + s % SIDE
        values = tl.load(x + token * C + c, mask=inside, other=0.0).to(tl.float32)
        mu, rstd = moments(values, c, C, eps)
        here = norms + s * W + window
        tl.store(here, mu, mask=window < W)
        tl.store(here + SIDE * SIDE * W, rstd, mask=window < W)
        total += values
    total /= SIDE * SIDE
    mu, rstd = moments(total, c, C, eps)
    weight = tl.load(norm_weight + c, mask=c < C, other=0.0).to(tl.float32)
    bias = tl.load(norm_bias + c, mask=c < C, other=0.0).to(tl.float32)
    out = window.to(tl.int64) * C + c
    tl.store(mean + out, total.to(mean.dtype.element_ty), mask=inside)
    tl.store(query_input + out, ((total - mu) * rstd * weight + bias).to(mean.dtype.element_ty), mask=inside)


@triton.jit
def head_rows(rows, window, head, j, W, C: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Columns of ``rows[W, C]`` that are tile ``j`` of a head: ``[BLOCK_W, BLOCK_D]``."""
    d = j * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    return tl.load(rows + window.to(tl.int64) * C + head * D + d, mask=(window < W) & (d < D), other=0.0)


@triton.jit
def weight_tile(weight, head, j, c, C: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of ``weight[C, C]`` that are tile ``j`` of a head: ``[BLOCK_D, BLOCK_C]``."""
    d = j * BLOCK_D + tl.arange(0, BLOCK_D)[:, None]
    return tl.load(weight + (head * D + d) * C + c, mask=(d < D) & (c < C), other=0.0)


@triton.jit
def token_values(values, window, W, S: tl.constexpr):
    """Of ``values[S, W]`` those of the windows' tokens, a tuple of ``[BLOCK_W, 1]``."""
    loaded = ()
    for s in tl.static_range(S):
        loaded += (tl.load(values + s * W + window, mask=window < W, other=0.0),)
    return loaded


@triton.jit
def centred(x, place, inside, s: tl.constexpr, w, c, means, C: tl.constexpr, SIDE: tl.constexpr):
    """Token ``s`` of each window less its mean, float32 ``[BLOCK_W, BLOCK_C]``."""
    token = place + s // SIDE * w + s % SIDE
    return tl.load(x + token * C + c, mask=inside & (c < C), other=0.0).to(tl.float32) - means[s]


@triton.jit
def scaled(values, factors):
    """A tuple times a tuple, element by element."""
    results = ()
    for s in tl.static_range(len(values)):
        results += (values[s] * factors[s],)
    return results


@triton.jit
def fold(rows, weight, head, c, C: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    """A chunk of ``weight_h^T`` times a head's rows, given in tiles: float32 ``[BLOCK_W, BLOCK_C]``."""
    folded = tl.zeros([rows[0].shape[0], c.shape[1]], tl.float32)
    for j in tl.static_range(len(rows)):
        folded = tl.dot(rows[j], weight_tile(weight, head, j, c, C, D, BLOCK_D), folded, input_precision=PRECISION)
    return folded


@triton.jit
def softmax(logits, scale):
    """Of a tuple, element by element."""
    top = logits[0]
    for s in tl.static_range(1, len(logits)):
        top = tl.maximum(top, logits[s], propagate_nan=tl.PropagateNan.ALL)
    weights = ()
    total = tl.zeros_like(top)
    for s in tl.static_range(len(logits)):
        weights += (tl.exp((logits[s] - top) * scale),)
        total += weights[s]
    for s in tl.static_range(len(logits)):
        weights = replaced(weights, s, weights[s] / total)
    return weights


@triton.jit
def meet(folded, x, place, inside, w, c, means, C: tl.constexpr, SIDE: tl.constexpr, products):
    """Adds the products of each folded vector with each centred token to ``products``, a tuple over both."""
    for s in tl.static_range(SIDE * SIDE):
        token = centred(x, place, inside, s, w, c, means, C, SIDE)
        for i in tl.static_range(len(folded)):
            added = products[i * SIDE * SIDE + s] + tl.sum(folded[i] * token, axis=1, keep_dims=True)
            products = replaced(products, i * SIDE * SIDE + s, added)
    return products


@triton.jit
def weighted_sums(weights, x, place, inside, w, c, means, C: tl.constexpr, SIDE: tl.constexpr):
    """Sums of the windows' centred tokens, one for each tuple of weights."""
    sums = ()
    for _ in tl.static_range(len(weights)):
        sums += (tl.zeros([place.shape[0], c.shape[1]], tl.float32),)
    for s in tl.static_range(SIDE * SIDE):
        token = centred(x, place, inside, s, w, c, means, C, SIDE)
        for i in tl.static_range(len(weights)):
            sums = replaced(sums, i, sums[i] + weights[i][s] * token)
    return sums


@triton.jit
def project(sums, rows, weight, head, c, C: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
             PRECISION: tl.constexpr):
    """Adds ``weight_h`` times a chunk of rows to ``sums``, a tuple of tiles of the head."""
    for j in tl.static_range(len(sums)):
        tile = tl.trans(weight_tile(weight, head, j, c, C, D, BLOCK_D))
        sums = replaced(sums, j, tl.dot(rows, tile, sums[j], input_precision=PRECISION))
    return sums


@triton.jit
def store_head(sums, rows, window, head, W, C: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    for j in tl.static_range(len(sums)):
        d = j * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
        here = rows + window.to(tl.int64) * C + head * D + d
        tl.store(here, sums[j].to(rows.dtype.element_ty), mask=(window < W) & (d < D))


@triton.jit(do_not_specialize=["w", "W", "scale"])
def attend(x, places, norms, q, norm_weight, norm_bias, wkv, out, w, W, scale, C: tl.constexpr, H: tl.constexpr,
           HEADS: tl.constexpr, SIDE: tl.constexpr, PRECISION: tl.constexpr,
           BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr):
    """The heads' outputs ``out[W, C]`` from their queries ``q[W, C]``."""
    D: tl.constexpr = C // H
    D_TILES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    S: tl.constexpr = SIDE * SIDE
    pid = tl.program_id(0)
    first = pid % (H // HEADS) * HEADS
    window = pid // (H // HEADS) * BLOCK_W + tl.arange(0, BLOCK_W)[:, None]
    inside = window < W
    place = tl.load(places + window, mask=inside, other=0)
    means = token_values(norms, window, W, S)

    queries = ()
    for i in tl.static_range(HEADS):
        tiles = ()
        for j in tl.static_range(D_TILES):
            tiles += (head_rows(q, window, first + i, j, W, C, D, BLOCK_D),)
        queries += (tiles,)
    logits = (tl.zeros([BLOCK_W, 1], tl.float32),) * (HEADS * S)
    for c0 in tl.range(0, C, BLOCK_C, num_stages=2):  # tokens too: they feed no product
        c = c0 + tl.arange(0, BLOCK_C)[None, :]
        gamma = tl.load(norm_weight + c, mask=c < C, other=0.0).to(tl.float32)
        folded = ()
        for i in tl.static_range(HEADS):
            folded += (fold(queries[i], wkv, first + i, c, C, D, BLOCK_D, PRECISION) * gamma,)
        logits = meet(folded, x, place, inside, w, c, means, C, SIDE, logits)

    rstds = token_values(norms + S * W, window, W, S)
    weights = ()
    sums = ()
    for i in tl.static_range(HEADS):
        weights += (scaled(softmax(scaled(logits[i * S:(i + 1) * S], rstds), scale), rstds),)
        sums += ((tl.zeros([BLOCK_W, BLOCK_D], tl.float32),) * D_TILES,)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)[None, :]
        gamma = tl.load(norm_weight + c, mask=c < C, other=0.0).to(tl.float32)
        beta = tl.load(norm_bias + c, mask=c < C, other=0.0).to(tl.float32)
        pooled = weighted_sums(weights, x, place, inside, w, c, means, C, SIDE)
        for i in tl.static_range(HEADS):
            rows = (pooled[i] * gamma + beta).to(x.dtype.element_ty)
            added = project(sums[i], rows, wkv + C * C, first + i, c, C, D, BLOCK_D, PRECISION)
            sums = replaced(sums, i, added)
    for i in tl.static_range(HEADS):
        store_head(sums[i], out, window, first + i, W, C, D, BLOCK_D)


class Windows(NamedTuple):
    """What ``statistics`` finds."""

    places: Tensor  # int64 [W]: the first token
    norms: Tensor  # float32 [2, S, W]: the tokens' means and reciprocal deviations
    mean: Tensor  # [W, C] in the tokens' dtype
    query_input: Tensor  # [W, C]: LayerNorm of the mean


def locate(x: Tensor, corners: Tensor, num_windows: int, norm_weight: Tensor, norm_bias: Tensor, window: int,
           eps: float) -> Windows:
    frames, h, w, C = x.shape
    config = choose(STATISTICS, row_tile(C), x, C=C, window=window)
    mean = torch.empty(num_windows, C, dtype=x.dtype, device=x.device)
    found = Windows(torch.empty(num_windows, dtype=torch.int64, device=x.device),
                    torch.empty(2, window**2, num_windows, dtype=torch.float32, device=x.device),
                    mean, torch.empty_like(mean))
    launch(statistics, cdiv(num_windows, config.rows), config, x=x, corners=corners, norm_weight=norm_weight,
           norm_bias=norm_bias, **found._asdict(), frames=frames, h=h, w=w, W=num_windows, eps=eps, C=C, SIDE=window)
    return found


def head_outputs(x: Tensor, found: Windows, q: Tensor, norm_weight: Tensor, norm_bias: Tensor, wkv: Tensor,
                 num_heads: int, window: int, scale: float) -> Tensor:
    """The heads' outputs, ``[W, C]``, before ``wp``."""
    W, C = q.shape
    config = choose(ATTEND, attend_tile(x.dtype, C // num_heads), x, C=C, heads=num_heads, window=window)
    heads = heads_together(x.dtype, num_heads, C // num_heads)
    out = torch.empty_like(q)
    launch(attend, cdiv(W, config.block_w) * (num_heads // heads), config, x=x, places=found.places,
           norms=found.norms, q=q, norm_weight=norm_weight, norm_bias=norm_bias, wkv=wkv, out=out, w=x.shape[2], W=W,
           scale=scale, C=C, H=num_heads, HEADS=heads, SIDE=window, PRECISION=input_precision(x.dtype))
    return out
