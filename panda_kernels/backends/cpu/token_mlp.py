"""Two products by blocks of rows, GELU in the epilogue of the first, its output never larger than a block."""
from __future__ import annotations

import torch
from torch import Tensor

from . import refusals  # noqa: F401
from ._arrays import array, compute_dtype, floats, kernels, pack


def fwd(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    dtype = compute_dtype(x.dtype)
    return run(x, pack(w1, dtype), floats(b1), pack(w2, dtype), floats(b2))


def run(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """With weights packed beforehand."""
    tokens = array(x).reshape(-1, x.shape[-1])
    y = torch.empty(tokens.shape[0], len(b2), dtype=tokens.dtype)
    kernels.token_mlp(tokens, w1, b1, w2, b2, y)
    return y.view(*x.shape[:-1], -1).to(x.dtype)
