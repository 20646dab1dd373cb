"""Two products by blocks of rows, GELU in the epilogue of the first, its output never larger than a block."""
from __future__ import annotations

import torch
from torch import Tensor

from . import refusals  # noqa: F401
from ._arrays import array, compute_dtype, floats, kernels, pack

Prepared = tuple[Tensor, Tensor, Tensor, Tensor]


def fwd(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return run(prepare(w1, b1, w2, b2), x)


def prepare(w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Prepared:
    """Weights packed, for callers who keep them."""
    dtype = compute_dtype(w1.dtype)
    return pack(w1, dtype), floats(b1), pack(w2, dtype), floats(b2)


def run(prepared: Prepared, x: Tensor) -> Tensor:
    """Tokens ``[..., C]`` of the weights' dtype, checked by the caller."""
    tokens = array(x).reshape(-1, x.shape[-1])
    y = torch.empty(tokens.shape[0], len(prepared[3]), dtype=tokens.dtype)
    kernels.token_mlp(tokens, *prepared, y)
    return y.view(*x.shape[:-1], -1).to(x.dtype)
