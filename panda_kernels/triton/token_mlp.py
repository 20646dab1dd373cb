"""The projector's hidden layer and its gradient: two products with one epilogue.

The floor is arithmetic: 2 * hidden * (C + out) operations a token. Forward, GELU is the first product's epilogue, so
that the hidden layer is written once and read once. Backward, one program multiplies a tile of the hidden layer anew
and the same tile of its gradient, and both leave through GELU together: what preceded GELU is never in memory.
"""
from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuning import Space, choose
from ._launch import cdiv, launch
from ._precision import input_precision
from .matmul import TILES, Tile, accumulate, bias_row, normal_cdf, place, tile

HIDDEN_GRADIENT = Space("triton.token_mlp.hidden_gradient", **TILES)


def gradient_tile(dtype: torch.dtype) -> Tile:
    """Two sums a thread, and still two programs a multiprocessor."""
    return replace(tile(dtype), block_n=64)


@triton.jit(do_not_specialize=["M"])
def hidden_gradient(x, w1, b1, grad, w2, activated, grad_hidden, M, C: tl.constexpr, HIDDEN: tl.constexpr,
                    OUT: tl.constexpr, PRECISION: tl.constexpr,
                    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """``activated = gelu(h)`` and ``grad_hidden = (grad w2) * gelu'(h)`` with ``h = x w1^T + b1``, ``[M, HIDDEN]``."""
    m0, n0 = place(tl.program_id(0), M, HIDDEN, BLOCK_M, BLOCK_N)
    m = (m0 + tl.arange(0, BLOCK_M)[:, None]).to(tl.int64)
    n = n0 + tl.arange(0, BLOCK_N)[None, :]
    hidden = accumulate(x, m, m < M, (0,), w1, n, C, HIDDEN, C, 1, C, BLOCK_K, PRECISION)[0] + bias_row(b1, n, HIDDEN)
    outer = accumulate(grad, m, m < M, (0,), w2, n, OUT, HIDDEN, OUT, HIDDEN, 1, BLOCK_K, PRECISION)[0]
    cdf = normal_cdf(hidden)
    outer *= cdf + hidden * tl.exp(-0.5 * hidden * hidden) * 0.3989422804014327
    inside = (m < M) & (n < HIDDEN)
    tl.store(activated + m * HIDDEN + n, (hidden * cdf).to(activated.dtype.element_ty), mask=inside)
    tl.store(grad_hidden + m * HIDDEN + n, outer.to(grad_hidden.dtype.element_ty), mask=inside)


def hidden_and_gradient(x: Tensor, w1: Tensor, b1: Tensor, grad: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
    """GELU's result and the gradient of its argument, both ``[M, hidden]``, from contiguous rows and weights."""
    (M, C), (hidden, out) = x.shape, w2.shape[::-1]
    config = choose(HIDDEN_GRADIENT, gradient_tile(x.dtype), x, C=C, hidden=hidden, out=out)
    activated = torch.empty(M, hidden, dtype=x.dtype, device=x.device)
    grad_hidden = torch.empty_like(activated)
    launch(hidden_gradient, cdiv(M, config.block_m) * cdiv(hidden, config.block_n), config, x=x, w1=w1,
           b1=b1, grad=grad, w2=w2, activated=activated, grad_hidden=grad_hidden, M=M, C=C, HIDDEN=hidden,
           OUT=out, PRECISION=input_precision(x.dtype))
    return activated, grad_hidden
