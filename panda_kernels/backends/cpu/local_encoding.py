"""LSTE streamed by bands of image rows (csrc/core/local_encoding.cpp), BatchNorm folded into the first product.

The gradient recomputes the bottleneck and x1 (docs/numerics.md).
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import refusals  # noqa: F401
from ._arrays import array, compute_dtype, floats, fold_norm, kernels, pack, product, tap_rows, weight_gradient
from .depthwise_conv3d import convolve, gradient

PANEL = 32  # channels that the products take at a time


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


def bwd(grad: Tensor, x: Tensor, norm_scale: Tensor, norm_shift: Tensor, w1: Tensor, b1: Tensor, wt: Tensor,
        bt: Tensor, w2: Tensor, b2: Tensor, wd: Tensor, bd: Tensor, *, needs: list[bool]) -> list[Tensor | None]:
    dtype, tokens, grads = compute_dtype(x.dtype), array(x), array(grad)
    reduced, channels = w1.shape
    # More channels of zeros in the bottleneck, which the products would only have to add row by row.
    more = -reduced % PANEL
    weight, bias = fold_norm(norm_scale, norm_shift, w1)
    weight, bias = F.pad(weight, (0, 0, 0, more)), F.pad(bias + b1.float(), (0, more))
    expand, time = F.pad(w2, (0, more)), F.pad(wt, (0, 0, 0, more))
    width, over_time = reduced + more, (3, 1, 1)

    def grid(rows: Tensor) -> Tensor:
        return rows.view(*x.shape[:-1], -1)

    rows = tokens.view(-1, channels)
    inner = product(rows, pack(weight, dtype), width, bias=bias)
    mixed = convolve(grid(inner), time.float().T.contiguous(), F.pad(floats(bt), (0, more)), over_time).view(-1, width)
    x1 = product(mixed, pack(expand, dtype), channels, bias=floats(b2), residual=rows)
    grad_wd, grad_bd = gradient(grid(x1), grads, (3, 3, 3))
    del x1
    grad_x1 = convolve(grads, tap_rows(wd.flip(2, 3, 4), residual=True), None, (3, 3, 3)).view(-1, channels)
    grad_w2, grad_b2 = weight_gradient(grad_x1, mixed)
    del mixed
    grad_mixed = product(grad_x1, pack(expand, dtype, transposed=True), width)
    grad_wt, grad_bt = gradient(grid(inner), grid(grad_mixed), over_time)
    del inner
    grad_inner = convolve(grid(grad_mixed), time.float().flip(1).T.contiguous(), None, over_time).view(-1, width)
    grad_x = None
    if needs[0]:
        grad_x = product(grad_inner, pack(weight, dtype, transposed=True), channels, residual=grad_x1)
        grad_x = grid(grad_x).to(x.dtype)
    products, sums = (t[:reduced] for t in weight_gradient(grad_inner, rows))
    precise = w1.float()
    grads_of_weights = [
        (precise * products).sum(0), sums @ precise, products * norm_scale.float() + sums[:, None] * norm_shift.float(),
        sums, grad_wt[:, :reduced].T, grad_bt[:reduced], grad_w2[:, :reduced], grad_b2,
        grad_wd.T.reshape(wd.shape), grad_bd]
    inputs = (norm_scale, norm_shift, w1, b1, wt, bt, w2, b2, wd, bd)
    return [grad_x, *(g.to(t.dtype) for g, t in zip(grads_of_weights, inputs, strict=True))]
