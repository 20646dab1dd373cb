"""LSTE streamed by bands of image rows (csrc/core/local_encoding.cpp), BatchNorm folded into the first product.

The gradient recomputes the bottleneck and x1 (docs/numerics.md).
"""
from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...tuning import Space
from . import refusals  # noqa: F401
from ._arrays import array, compute_dtype, floats, fold_norm, kernels, pack, product, tap_rows, weight_gradient
from ._tuning import tune
from .depthwise_conv3d import convolve, gradient

SPACE = Space("cpu.local_encoding", band_tokens=(256, 512, 1024, 2048), product_rows=(256, 512, 1024),
              staged_channels=(128, 256, 512))

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
    tune(SPACE, tokens, C=w1.shape[1], R=w1.shape[0], direction="fwd")
    kernels.local_encoding(tokens, weights, w1.shape[0], y)
    return y.to(x.dtype)


class _Return(NamedTuple):
    """What the gradient of every clip needs, the bottleneck widened to whole panels by channels of zeros."""

    squeeze: Tensor
    squeeze_bias: Tensor
    time: Tensor
    time_bias: Tensor
    expand: Tensor
    expand_bias: Tensor
    squeeze_back: Tensor
    time_back: Tensor
    expand_back: Tensor
    position_back: Tensor


def _return(dtype: torch.dtype, norm_scale: Tensor, norm_shift: Tensor, w1: Tensor, b1: Tensor, wt: Tensor, bt: Tensor,
            w2: Tensor, b2: Tensor, wd: Tensor) -> _Return:
    more = -len(w1) % PANEL
    weight, bias = fold_norm(norm_scale, norm_shift, w1)
    weight, expand = F.pad(weight, (0, 0, 0, more)), F.pad(w2, (0, more))
    time = F.pad(wt.float(), (0, 0, 0, more)).T.contiguous()
    return _Return(pack(weight, dtype), F.pad(bias + b1.float(), (0, more)), time, F.pad(floats(bt), (0, more)),
                   pack(expand, dtype), floats(b2), pack(weight, dtype, transposed=True), time.flip(0),
                   pack(expand, dtype, transposed=True), tap_rows(wd.flip(2, 3, 4), residual=True))


def _clip_bwd(grad: Tensor, x: Tensor, w: _Return, sums: list[tuple[Tensor, Tensor]],
              grad_x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Writes ``grad_x`` of one clip ``[1, T, h, w, C]``; adds to the sums of both products' gradients, and of both
    convolutions'."""
    def grid(rows: Tensor) -> Tensor:
        return rows.view(*x.shape[:-1], -1)

    over_time, channels, width = (3, 1, 1), x.shape[-1], len(w.squeeze_bias)
    rows = x.view(-1, channels)
    inner = product(rows, w.squeeze, width, bias=w.squeeze_bias)
    mixed = convolve(grid(inner), w.time, w.time_bias, over_time).view(-1, width)
    x1 = product(mixed, w.expand, channels, bias=w.expand_bias, residual=rows)
    position = gradient(grid(x1), grad, (3, 3, 3))
    del x1
    grad_x1 = convolve(grad, w.position_back, None, (3, 3, 3)).view(-1, channels)
    expand = weight_gradient(grad_x1, mixed, sums[1] if sums else None)
    del mixed
    grad_mixed = product(grad_x1, w.expand_back, width)
    time = gradient(grid(inner), grid(grad_mixed), over_time)
    del inner
    grad_inner = convolve(grid(grad_mixed), w.time_back, None, over_time).view(-1, width)
    del grad_mixed
    product(grad_inner, w.squeeze_back, channels, residual=grad_x1, out=grad_x.view(-1, channels))
    squeeze = weight_gradient(grad_inner, rows, sums[0] if sums else None)
    for new, old in zip((time, position), sums[2:], strict=False):
        new[0].add_(old[0])
        new[1].add_(old[1])
    return [squeeze, expand, time, position]


def bwd(grad: Tensor, x: Tensor, norm_scale: Tensor, norm_shift: Tensor, w1: Tensor, b1: Tensor, wt: Tensor,
        bt: Tensor, w2: Tensor, b2: Tensor, wd: Tensor, bd: Tensor, *, needs: list[bool]) -> list[Tensor | None]:
    """Clip by clip, so that the intermediates of one exist at a time."""
    weights = _return(compute_dtype(x.dtype), norm_scale, norm_shift, w1, b1, wt, bt, w2, b2, wd)
    tokens, grads = array(x), array(grad)
    tune(SPACE, tokens, C=w1.shape[1], R=w1.shape[0], direction="bwd")
    grad_x, sums = torch.empty_like(tokens), list[tuple[Tensor, Tensor]]()
    for clip in zip(grads.split(1), tokens.split(1), grad_x.split(1), strict=True):
        sums = _clip_bwd(clip[0], clip[1], weights, sums, clip[2])
    (squeeze, e), (expand, grad_b2), (time, time_bias), (position, grad_bd) = sums
    reduced, precise = len(w1), w1.float()
    squeeze, e = squeeze[:reduced], e[:reduced]
    found = [(precise * squeeze).sum(0), e.double() @ precise.double(),
             squeeze * norm_scale.float() + e[:, None] * norm_shift.float(), e, time[:, :reduced].T,
             time_bias[:reduced], expand[:, :reduced], grad_b2, position.T.reshape(wd.shape), grad_bd]
    inputs = (norm_scale, norm_shift, w1, b1, wt, bt, w2, b2, wd, bd)
    return [grad_x.to(x.dtype), *(g.to(t.dtype) for g, t in zip(found, inputs, strict=True))]
