"""Products of a few rows, from what the two global poolings leave to each frame's class token.

The floor is memory: each weight read once for all rows, 27 MB for C = 1024 in bfloat16, 9 us on an H100. Some ten rows
are no work for tensor cores, and tiles that feed them would leave most of the card idle. So a program takes eight
columns, of which each warp has one, and multiplies them by four rows in float32: 128 programs for 1024 columns, with
all the weights they need for the next 1024 numbers on their way before the first is used. What comes before a product,
a norm or the mixture of a clip and its frame, every program computes anew for its rows, out of L2.

Of the two attentions, values and outputs are a launch each for both: :func:`pair`. The value and output projections of
a fixed query are linear, and could be one matrix, but of ``n`` times the bytes: 12.6 MB more, 4 us, to save a launch.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuning import Space, choose
from ._launch import Config, cdiv, launch


@dataclass(frozen=True, kw_only=True)
class Tile(Config):
    rows: int = 4
    block_n: int = 8
    block_k: int = 256


TILE = Tile(threads=256)
TILES: dict[str, tuple[int, ...]] = {"rows": (2, 4, 8), "block_n": (4, 8, 16), "block_k": (128, 256, 512),
                                     "threads": (128, 256)}
LINEAR = Space("triton.class_tokens.linear", **TILES)
PAIR = Space("triton.class_tokens.pair", **TILES)


@triton.jit
def _parameter(vector, k, K: tl.constexpr):
    """Of a vector ``[K]``; if there is none, something that nobody reads, as not every Triton returns None."""
    value = k
    if vector is not None:
        value = tl.load(vector + k, mask=k < K, other=0.0)
    return value


@triton.jit
def _numbers(x, clip, own, row, sample, k, inside, K: tl.constexpr):
    """Row ``row`` of ``x[rows, K]``, or its mixture by shares ``own`` with row ``sample`` of ``clip``."""
    value = tl.load(x + row * K + k, mask=inside, other=0.0)
    if clip is not None:
        value = own * value + (1.0 - own) * tl.load(clip + sample * K + k, mask=inside, other=0.0)
    return value


@triton.jit
def _moments(x, clip, share, first, rows, T, eps, K: tl.constexpr, ROWS: tl.constexpr):
    """Means and reciprocal deviations of rows, two tuples."""
    k = tl.arange(0, triton.next_power_of_2(K))
    own = _parameter(share, k, K)
    means = ()
    rstds = ()
    for i in tl.static_range(ROWS):
        row = (first + i).to(tl.int64)
        value = _numbers(x, clip, own, row, row // T, k, (k < K) & (row < rows), K)
        mean = tl.sum(value, axis=0) / K
        centred = tl.where(k < K, value - mean, 0.0)
        means += (mean,)
        rstds += (1.0 / tl.sqrt_rn(tl.sum(centred * centred, axis=0) / K + eps),)
    return means, rstds


@triton.jit
def _columns(pid, x, clip, share, norm_weight, norm_bias, w, bias, residual, y, rows, T, eps, K: tl.constexpr,
             N: tl.constexpr, HEADS: tl.constexpr, NORM: tl.constexpr, QUICK_GELU: tl.constexpr, ROWS: tl.constexpr,
             BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, UNROLL: tl.constexpr):
    """One tile of ``y[rows, N] = quick_gelu(w norm(x) + bias) + residual``; a head's columns have their own x."""
    D: tl.constexpr = N // HEADS
    TILES: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    d = pid % TILES * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    head = pid // TILES % HEADS
    first = pid // (TILES * HEADS) * ROWS
    n = head * D + d
    if NORM:
        means, rstds = _moments(x, clip, share, first, rows, T, eps, K, ROWS)
    sums = (tl.zeros([BLOCK_N, BLOCK_K], tl.float32),) * ROWS
    for k0 in range(0, K, BLOCK_K * UNROLL):
        weights = ()
        for j in tl.static_range(UNROLL):
            # Whole tiles of what belongs to a row, too: one row of them would have to change its layout.
            k = k0 + j * BLOCK_K + tl.arange(0, BLOCK_K)[None, :] + tl.zeros([BLOCK_N, 1], tl.int32)
            weights += (tl.load(w + n.to(tl.int64) * K + k, mask=(d < D) & (k < K), other=0.0),)
        for j in tl.static_range(UNROLL):
            k = k0 + j * BLOCK_K + tl.arange(0, BLOCK_K)[None, :] + tl.zeros([BLOCK_N, 1], tl.int32)
            gamma, beta, own = _parameter(norm_weight, k, K), _parameter(norm_bias, k, K), _parameter(share, k, K)
            for i in tl.static_range(ROWS):
                row = (first + i).to(tl.int64)
                value = _numbers(x, clip, own, row * HEADS + head, row // T, k, (k < K) & (row < rows), K)
                if NORM:
                    value = (value - means[i]) * rstds[i]
                if norm_weight is not None:
                    value = value * gamma + beta
                sums = sums[:i] + (sums[i] + value * weights[j].to(tl.float32),) + sums[i + 1:]  # noqa: RUF005
    for i in tl.static_range(ROWS):
        row = (first + i).to(tl.int64)
        inside = (d < D) & (row < rows)
        result = tl.sum(sums[i], axis=1, keep_dims=True) + tl.load(bias + n, mask=d < D, other=0.0)
        if QUICK_GELU:
            result = result / (1.0 + tl.exp(-1.702 * result))
        if residual is not None:
            result += tl.load(residual + row * N + n, mask=inside, other=0.0)
        tl.store(y + row * N + n, result.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "T", "eps"])
def linear(w, x, clip, share, norm_weight, norm_bias, bias, residual, y, rows, T, eps, K: tl.constexpr, N: tl.constexpr,
           QUICK_GELU: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
           UNROLL: tl.constexpr):
    """``y[rows, N] = quick_gelu(w LayerNorm(x) + bias) + residual``, each of the three if it is asked for."""
    NORM: tl.constexpr = norm_weight is not None
    _columns(tl.program_id(0), x, clip, share, norm_weight, norm_bias, w, bias, residual, y, rows, T, eps, K, N, 1,
             NORM, QUICK_GELU, ROWS, BLOCK_N, BLOCK_K, UNROLL)


@triton.jit(do_not_specialize=["programs", "rows", "other_rows"])
def pair(w, x, norm_weight, norm_bias, bias, y, other_x, other_norm_weight, other_norm_bias, other_w, other_bias,
         other_y, programs, rows, other_rows, K: tl.constexpr, N: tl.constexpr, HEADS: tl.constexpr,
         OTHER_HEADS: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
         UNROLL: tl.constexpr):
    """Two products of one size, each ``y[rows, N]`` of ``x[rows, heads, K]``; the first takes ``programs``."""
    pid = tl.program_id(0)
    if other_x is None:
        _columns(pid, x, None, None, norm_weight, norm_bias, w, bias, None, y, rows, 1, 0.0, K, N, HEADS, False, False,
                 ROWS, BLOCK_N, BLOCK_K, UNROLL)
    else:
        if pid < programs:
            _columns(pid, x, None, None, norm_weight, norm_bias, w, bias, None, y, rows, 1, 0.0, K, N, HEADS, False,
                     False, ROWS, BLOCK_N, BLOCK_K, UNROLL)
        else:
            _columns(pid - programs, other_x, None, None, other_norm_weight, other_norm_bias, other_w, other_bias, None,
                     other_y, other_rows, 1, 0.0, K, N, OTHER_HEADS, False, False, ROWS, BLOCK_N, BLOCK_K, UNROLL)


class Linear(NamedTuple):
    """Weight ``[N, K]``, and in float32 its bias ``[N]`` and the affine ``[K]`` of the norm before it, if there is one.
    """

    w: Tensor
    bias: Tensor
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None


def _unroll(K: int, block_k: int) -> int:
    """Blocks of weights on their way at a time: up to four, as many each time."""
    blocks = cdiv(K, block_k)
    return cdiv(blocks, cdiv(blocks, 4))


def apply(weights: Linear, x: Tensor, eps: float, *, clip: Tensor | None = None, share: Tensor | None = None,
          residual: Tensor | None = None, quick_gelu: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
    """``[rows, N]`` of float32 rows ``x[rows, K]``, normalised where the weights have a norm.

    With ``clip[B, K]`` and ``share[K]`` a row is first mixed with its clip's: ``share x + (1 - share) clip``.
    """
    N, K = weights.w.shape
    config = choose(LINEAR, TILE, weights.w, N=N, K=K)
    y = torch.empty(len(x), N, dtype=dtype, device=x.device)
    launch(linear, cdiv(len(x), config.rows) * cdiv(N, config.block_n), config, x=x, clip=clip,
           share=share, **weights._asdict(), residual=residual, y=y, rows=len(x),
           T=1 if clip is None else len(x) // len(clip), eps=eps, K=K, N=N, QUICK_GELU=quick_gelu,
           UNROLL=_unroll(K, config.block_k))
    return y


def apply_both(first: Linear, x: Tensor, other: Linear | None, other_x: Tensor | None,
               dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor | None]:
    """``[rows, N]`` of each of float32 ``x[rows, heads, K]`` in one launch; ``other`` may be None."""
    N, K = first.w.shape
    # Wider rows spill on sm_100 as soon as two products share a kernel, for fewer threads or four at a time.
    config = choose(PAIR, TILE if K <= 1024 else replace(TILE, rows=2, threads=512), first.w, N=N, K=K)

    def programs(x: Tensor | None) -> int:
        if x is None:
            return 0
        rows, heads, _ = x.shape
        return cdiv(rows, config.rows) * heads * cdiv(N // heads, config.block_n)

    y = torch.empty(len(x), N, dtype=dtype, device=x.device)
    other_y = None if other_x is None else torch.empty(len(other_x), N, dtype=dtype, device=x.device)
    others: dict[str, Tensor | None] = dict.fromkeys(Linear._fields) if other is None else other._asdict()
    launch(pair, programs(x) + programs(other_x), config, x=x, **first._asdict(), y=y, other_x=other_x,
           **{f"other_{name}": value for name, value in others.items()}, other_y=other_y, programs=programs(x),
           rows=len(x), other_rows=0 if other_x is None else len(other_x), K=K, N=N, HEADS=x.shape[1],
           OTHER_HEADS=1 if other_x is None else other_x.shape[1], UNROLL=_unroll(K, config.block_k))
    return y, other_y
