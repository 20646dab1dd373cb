"""LSTE with the norm folded into the product after it, the rest through the depthwise convolution.

Gradients recompute the two bottleneck activations and x1 instead of storing them (docs/numerics.md).
"""
from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from . import depthwise_conv3d, refusals  # noqa: F401
from ._arithmetic import linear, matmul, rows, total, wide


def _folded(x: Tensor, norm_scale: Tensor, norm_shift: Tensor, w1: Tensor, b1: Tensor) -> tuple[Tensor, Tensor]:
    """W1 and b1 with the norm's affine in them, composed in the wide dtype."""
    precise = w1.to(wide(x))
    weight = precise * norm_scale.to(precise.dtype)
    bias = F.linear(norm_shift.to(precise.dtype), precise, b1.to(precise.dtype))
    return weight.to(x.dtype), bias.to(x.dtype)


def _taps(wt: Tensor) -> Tensor:
    return wt[:, None, :, None, None]


def fwd(x: Tensor, norm_scale: Tensor, norm_shift: Tensor, w1: Tensor, b1: Tensor, wt: Tensor, bt: Tensor, w2: Tensor,
        b2: Tensor, wd: Tensor, bd: Tensor) -> Tensor:
    inner = linear(x, *_folded(x, norm_scale, norm_shift, w1, b1))
    over_time = depthwise_conv3d.fwd(inner, _taps(wt), bt, False)
    return depthwise_conv3d.fwd(linear(over_time, w2, b2).add_(x), wd, bd, True)


def bwd(grad: Tensor, x: Tensor, norm_scale: Tensor, norm_shift: Tensor, w1: Tensor, b1: Tensor, wt: Tensor,
        bt: Tensor, w2: Tensor, b2: Tensor, wd: Tensor, bd: Tensor, *, needs: list[bool]) -> list[Tensor | None]:
    weight, bias = _folded(x, norm_scale, norm_shift, w1, b1)
    inner = linear(x, weight, bias)
    over_time = depthwise_conv3d.fwd(inner, _taps(wt), bt, False)
    x1 = linear(over_time, w2, b2).add_(x)

    grad_x1, grad_wd, grad_bd = depthwise_conv3d.bwd(grad, x1, wd, bd, True, needs=[True, needs[9], needs[10]])
    del x1
    assert grad_x1 is not None
    grad_w2 = matmul(rows(grad_x1).T, rows(over_time)) if needs[7] else None
    grad_b2 = total(grad_x1).to(x.dtype) if needs[8] else None
    if not any(needs[:7]):
        return [None] * 7 + [grad_w2, grad_b2, grad_wd, grad_bd]

    grad_inner, grad_taps, grad_bt = depthwise_conv3d.bwd(
        matmul(grad_x1, w2), inner, _taps(wt), bt, False, needs=[True, needs[5], needs[6]])
    assert grad_inner is not None
    grad_x = (matmul(grad_inner, weight).add_(grad_x1)) if needs[0] else None
    norm_grads = norm_and_w1(grad_inner, x, norm_scale, norm_shift, w1, b1, needs[1:5])
    return [grad_x, *norm_grads, None if grad_taps is None else grad_taps.view(wt.shape), grad_bt, grad_w2, grad_b2,
            grad_wd, grad_bd]


def norm_and_w1(grad_inner: Tensor, x: Tensor, norm_scale: Tensor, norm_shift: Tensor, w1: Tensor, b1: Tensor,
                 needs: list[bool]) -> list[Tensor | None]:
    """Gradients of the norm's scale and shift, of w1 and b1, all from one product ``grad_inner^T x``."""
    if not any(needs):
        return [None] * 4
    products = matmul(rows(grad_inner).T, rows(x)).to(wide(x))
    sums, precise = total(grad_inner), w1.to(wide(x))
    grad_w1 = products * norm_scale.to(precise.dtype) + sums[:, None] * norm_shift.to(precise.dtype)
    return [(precise * products).sum(0).to(norm_scale.dtype), (sums.double() @ precise.double()).to(norm_shift.dtype),
            grad_w1.to(w1.dtype), sums.to(b1.dtype)]
