"""Products of token rows with a weight, with what follows them in the epilogue.

Written by hand, rather than left to the vendor's library, for two reasons: the epilogues, and that a row's result must
have the same bits in any company, while a library chooses its blocking by the number of rows. So the tile depends on
the dtype alone, and K is summed in one order. The floor is the tensor cores: at 128 x 128 x 64 two programs share a
multiprocessor of an H100, one multiplying while the other loads or ends. Tiles are taken in groups of eight rows, so
that those running together share their operands in L2.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuning import Space, choose
from ._launch import Config, cdiv, launch
from ._precision import input_precision


@dataclass(frozen=True, kw_only=True)
class Tile(Config):
    block_m: int
    block_n: int
    block_k: int


def tile(dtype: torch.dtype) -> Tile:
    if dtype == torch.float32:  # without tensor cores: registers hold less, and 16 bytes are four numbers
        return Tile(block_m=128, block_n=64, block_k=16, threads=256, num_stages=3)
    return Tile(block_m=128, block_n=128, block_k=64, threads=256, num_stages=3)


TILES: dict[str, tuple[int, ...]] = {"block_m": (64, 128), "block_n": (64, 128), "block_k": (16, 32, 64),
                                     "threads": (128, 256), "num_stages": (3, 4)}
PRODUCT = Space("triton.matmul.product", **TILES)
SCALED_PRODUCT = Space("triton.matmul.scaled_product", **{**TILES, "block_k": (64, 128)})


def tile_of_e4m3(dtype: torch.dtype) -> Tile:
    """128 bytes of K as of 16 bits; a residual in float32 leaves registers for half as many columns."""
    return Tile(block_m=128, block_n=64 if dtype == torch.float32 else 128, block_k=128, threads=256, num_stages=3)


@triton.jit
def place(pid, M, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """First row and column of a program's tile, in groups of eight tiles of rows."""
    N_TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    first = pid // (8 * N_TILES) * 8
    size = tl.minimum(tl.cdiv(M, BLOCK_M) - first, 8)
    within = pid % (8 * N_TILES)
    return (first + within % size) * BLOCK_M, within // size * BLOCK_N


@triton.jit
def accumulate(a, m, inside, offsets, b, n, A_WIDTH: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
               B_K: tl.constexpr, B_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):
    """Float32 sums over K for the same columns ``n[1, BLOCK_N]`` of several blocks of rows, a tuple.

    The rows are ``m[BLOCK_M, 1] + offset`` of ``a[:, A_WIDTH]`` for each of the ``offsets``, int64, zero where not
    ``inside``; element ``[k, n]`` of the weight lies at ``b + k * B_K + n * B_N``.
    """
    k = tl.arange(0, BLOCK_K)
    blocks = a + (m * A_WIDTH + k[None, :])
    weights = b + (k[:, None] * B_K + n * B_N)
    sums = (tl.zeros([m.shape[0], n.shape[1]], tl.float32),) * len(offsets)
    for k0 in range(0, K, BLOCK_K):
        weight = tl.load(weights + k0 * B_K, mask=(k < K - k0)[:, None] & (n < N), other=0.0)
        for i in tl.static_range(len(offsets)):
            block = tl.load(blocks + (offsets[i] * A_WIDTH + k0), mask=inside & (k < A_WIDTH - k0)[None, :], other=0.0)
            added = tl.dot(block, weight, sums[i], input_precision=PRECISION)
            sums = sums[:i] + (added,) + sums[i + 1:]  # noqa: RUF005 - Triton knows no other way
    return sums


@triton.jit
def bias_row(bias, n, N: tl.constexpr):
    return tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)


@triton.jit
def normal_cdf(x):
    return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)


@triton.jit(do_not_specialize=["M"])
def product(a, b, bias, residual, y, M, N: tl.constexpr, K: tl.constexpr, A_WIDTH: tl.constexpr, B_K: tl.constexpr,
            B_N: tl.constexpr, RESIDUAL_WIDTH: tl.constexpr, GELU: tl.constexpr, PRECISION: tl.constexpr,
            BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """``y[M, N] = gelu(a b + bias) + residual``, each of the three if it is asked for."""
    m0, n0 = place(tl.program_id(0), M, N, BLOCK_M, BLOCK_N)
    m = (m0 + tl.arange(0, BLOCK_M)[:, None]).to(tl.int64)
    n = n0 + tl.arange(0, BLOCK_N)[None, :]
    result = accumulate(a, m, m < M, (0,), b, n, A_WIDTH, N, K, B_K, B_N, BLOCK_K, PRECISION)[0]
    if bias is not None:
        result += bias_row(bias, n, N)
    if GELU:
        result *= normal_cdf(result)
    inside = (m < M) & (n < N)
    if residual is not None:
        result += tl.load(residual + m * RESIDUAL_WIDTH + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + m * N + n, result.to(y.dtype.element_ty), mask=inside)


def multiply(a: Tensor, weight: Tensor, bias: Tensor | None = None, *, residual: Tensor | None = None,
             transposed: bool = False, gelu: bool = False) -> Tensor:
    """``gelu(a weight^T + bias) + residual`` for rows ``a[M, K]``; ``a weight`` if ``transposed``.

    Tensors are contiguous, of one dtype but for the bias. ``a`` may have more columns than the weight has numbers for;
    they must be zero. The residual may be columns of a wider matrix.
    """
    K, N = weight.shape if transposed else weight.shape[::-1]
    M, config = a.shape[0], choose(PRODUCT, tile(a.dtype), a, N=N, K=K, transposed=transposed)
    y = torch.empty(M, N, dtype=a.dtype, device=a.device)
    launch(product, cdiv(M, config.block_m) * cdiv(N, config.block_n), config, a=a, b=weight, bias=bias,
           residual=residual, y=y, M=M, N=N, K=K, A_WIDTH=a.shape[1], B_K=N if transposed else 1,
           B_N=1 if transposed else K, RESIDUAL_WIDTH=0 if residual is None else residual.stride(-2), GELU=gelu,
           PRECISION=input_precision(a.dtype))
    return y


@triton.jit(do_not_specialize=["M"])
def scaled_product(a, a_scales, b, b_scales, bias, residual, y, M, N: tl.constexpr, K: tl.constexpr,
                   RESIDUAL_WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """``y[M, N] = a_scales b_scales (a b^T) + bias + residual`` of e4m3 ``a[M, K]`` and ``b[N, K]``."""
    m0, n0 = place(tl.program_id(0), M, N, BLOCK_M, BLOCK_N)
    m = (m0 + tl.arange(0, BLOCK_M)[:, None]).to(tl.int64)
    n = n0 + tl.arange(0, BLOCK_N)[None, :]
    inside = (m < M) & (n < N)
    result = accumulate(a, m, m < M, (0,), b, n, K, N, K, 1, K, BLOCK_K, "ieee")[0]
    result *= tl.load(a_scales + m, mask=m < M, other=0.0)
    result = result * tl.load(b_scales + n, mask=n < N, other=0.0) + bias_row(bias, n, N)
    result += tl.load(residual + m * RESIDUAL_WIDTH + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + m * N + n, result.to(y.dtype.element_ty), mask=inside)


def multiply_scaled(a: Tensor, a_scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor,
                    residual: Tensor) -> Tensor:
    """``a_scales weight_scales (a weight^T) + bias + residual``, ``[M, N]`` in the residual's dtype.

    ``a[M, K]`` and ``weight[N or more, K]`` are contiguous and e4m3, their scales float32, one a row; ``bias[N]`` has
    any dtype, and ``residual[M, N]`` may be columns of a wider matrix.
    """
    (M, K), N = a.shape, len(bias)
    config = choose(SCALED_PRODUCT, tile_of_e4m3(residual.dtype), residual, N=N, K=K)
    y = torch.empty(M, N, dtype=residual.dtype, device=a.device)
    launch(scaled_product, cdiv(M, config.block_m) * cdiv(N, config.block_n), config, a=a, a_scales=a_scales, b=weight,
           b_scales=weight_scales, bias=bias, residual=residual, y=y, M=M, N=N, K=K,
           RESIDUAL_WIDTH=residual.stride(0))
    return y
