"""LSTE streamed by bands of image rows (csrc/core/local_encoding.cpp), BatchNorm folded into the first product."""
from __future__ import annotations

import torch
from torch import Tensor

from . import refusals  # noqa: F401
from ._arrays import array, compute_dtype, floats, fold_norm, kernels, pack, tap_rows


def streamed_weights(dtype: torch.dtype, wt: Tensor, bt: Tensor, w2: Tensor, b2: Tensor, wd: Tensor,
                     bd: Tensor) -> list[Tensor]:
    """What follows the first product, in the order of ``local_weights`` in csrc/bindings.cpp."""
    return [wt.float().T.contiguous(), floats(bt), pack(w2, dtype), floats(b2), tap_rows(wd, residual=True), floats(bd)]


def fwd(x: Tensor, norm_scale: Tensor, norm_shift: Tensor, w1: Tensor, b1: Tensor, wt: Tensor, bt: Tensor, w2: Tensor,
        b2: Tensor, wd: Tensor, bd: Tensor) -> Tensor:
    dtype = compute_dtype(x.dtype)
    tokens = array(x)
    y = torch.empty_like(tokens)
    weight, bias = fold_norm(norm_scale, norm_shift, w1)
    weights = [pack(weight, dtype), bias + b1.float(), *streamed_weights(dtype, wt, bt, w2, b2, wd, bd)]
    kernels.local_encoding(tokens, weights, w1.shape[0], y)
    return y.to(x.dtype)
