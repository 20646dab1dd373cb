"""LSTE streamed by bands of image rows (csrc/core/local_encoding.cpp), BatchNorm folded into the first product.

The gradient recomputes the bottleneck and x1 if the forward has not kept them (docs/numerics.md).
"""
from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...tuning import Space
from . import refusals  # noqa: F401
from ._arrays import (
    PANEL,
    array,
    column_products,
    compute_dtype,
    floats,
    fold_norm,
    kernels,
    pack,
    precise_product,
    product,
    result,
    result_like,
    tap_rows,
    weight_gradient,
)
from ._tuning import tune
from .depthwise_conv3d import convolve, gradient

SPACE = Space("cpu.local_encoding", band_tokens=(256, 512, 1024, 2048), product_rows=(256, 512, 1024),
              staged_channels=(128, 256, 512))

OVER_TIME, POSITION = (3, 1, 1), (3, 3, 3)


def streamed_weights(dtype: torch.dtype, wt: Tensor, bt: Tensor, w2: Tensor, b2: Tensor, wd: Tensor,
                     bd: Tensor) -> list[Tensor]:
    """What follows the first product, in the order of ``local_weights`` in csrc/bindings.cpp."""
    return [wt.float().T.contiguous(), floats(bt), pack(w2, dtype), floats(b2), tap_rows(wd, residual=True), floats(bd)]


def fwd(x: Tensor, norm_scale: Tensor, norm_shift: Tensor, w1: Tensor, b1: Tensor, wt: Tensor, bt: Tensor, w2: Tensor,
        b2: Tensor, wd: Tensor, bd: Tensor) -> Tensor:
    dtype = compute_dtype(x.dtype)
    tokens = array(x)
    y = result_like(tokens)
    weight, bias = fold_norm(norm_scale, norm_shift, w1)
    weights = [pack(weight, dtype), bias + b1.float(), *streamed_weights(dtype, wt, bt, w2, b2, wd, bd)]
    tune(SPACE, tokens, C=w1.shape[1], R=w1.shape[0], direction="fwd")
    kernels.local_encoding(tokens, weights, w1.shape[0], y)
    return y.to(x.dtype)


@dataclass(frozen=True)
class _Bottleneck:
    """From the tokens of a clip ``[1, T, h, w, C]`` to x1, the norm in its weights; channels of zeros fill the last
    panel."""

    dtype: torch.dtype
    squeeze: Tensor
    squeeze_bias: Tensor
    time: Tensor
    time_bias: Tensor
    expand: Tensor
    expand_bias: Tensor

    @functools.cached_property
    def _packed_squeeze(self) -> Tensor:
        return pack(self.squeeze, self.dtype)

    @functools.cached_property
    def _packed_expand(self) -> Tensor:
        return pack(self.expand, self.dtype)

    def room(self, x: Tensor) -> Tensor:
        return result(*x.shape[:-1], len(self.squeeze_bias), dtype=self.dtype)

    def down(self, x: Tensor, inner: Tensor) -> Tensor:
        product(_rows(x), self._packed_squeeze, inner.shape[-1], bias=self.squeeze_bias, out=_rows(inner))
        return inner

    def mix(self, inner: Tensor) -> Tensor:
        return convolve(inner, self.time, self.time_bias, OVER_TIME)

    def up(self, mixed: Tensor, x: Tensor, out: Tensor) -> Tensor:
        product(_rows(mixed), self._packed_expand, x.shape[-1], bias=self.expand_bias, residual=_rows(x),
                out=_rows(out))
        return out


def _bottleneck(dtype: torch.dtype, norm_scale: Tensor, norm_shift: Tensor, w1: Tensor, b1: Tensor, wt: Tensor,
                bt: Tensor, w2: Tensor, b2: Tensor) -> _Bottleneck:
    more = -len(w1) % PANEL
    weight, bias = fold_norm(norm_scale, norm_shift, w1)
    return _Bottleneck(dtype, F.pad(weight, (0, 0, 0, more)), F.pad(bias + b1.float(), (0, more)),
                       F.pad(wt.float(), (0, 0, 0, more)).T.contiguous(), F.pad(floats(bt), (0, more)),
                       F.pad(w2, (0, more)), floats(b2))


def _rows(grid: Tensor) -> Tensor:
    return grid.view(-1, grid.shape[-1])


def keep(x: Tensor, norm_scale: Tensor, norm_shift: Tensor, w1: Tensor, b1: Tensor, wt: Tensor, bt: Tensor, w2: Tensor,
         b2: Tensor, wd: Tensor, bd: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The same bits, the bottleneck of all tokens and x1 kept."""
    tokens = array(x)
    tune(SPACE, tokens, C=w1.shape[1], R=w1.shape[0], direction="fwd")
    part = _bottleneck(tokens.dtype, norm_scale, norm_shift, w1, b1, wt, bt, w2, b2)
    y, inner, x1 = result_like(tokens), part.room(tokens), result_like(tokens)
    part.up(part.mix(part.down(tokens, inner)), tokens, x1)
    convolve(x1, tap_rows(wd, residual=True), floats(bd), POSITION, out=y)
    return y.to(x.dtype), [inner, x1]


class _Return(NamedTuple):
    """What gradients return through."""

    squeeze: Tensor
    time: Tensor
    expand: Tensor
    position: Tensor


def _clip_bwd(grad: Tensor, x: Tensor, inner: Tensor, x1: Tensor | None, part: _Bottleneck, back: _Return,
              sums: list[tuple[Tensor, Tensor]], grad_x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Writes ``grad_x`` of one clip ``[1, T, h, w, C]``; adds to the sums of both products' gradients, and of both
    convolutions'."""
    mixed = part.mix(inner)
    position = gradient(part.up(mixed, x, result_like(x)) if x1 is None else x1, grad, POSITION)
    grad_x1 = _rows(convolve(grad, back.position, None, POSITION, out=grad_x))
    expand = weight_gradient(grad_x1, _rows(mixed), sums[1] if sums else None)
    del mixed
    grad_mixed = product(grad_x1, back.expand, inner.shape[-1]).view(inner.shape)
    time = gradient(inner, grad_mixed, OVER_TIME)
    grad_inner = _rows(convolve(grad_mixed, back.time, None, OVER_TIME))
    del grad_mixed
    product(grad_inner, back.squeeze, x.shape[-1], residual=grad_x1, out=grad_x1)
    squeeze = weight_gradient(grad_inner, _rows(x), sums[0] if sums else None)
    for new, old in zip((time, position), sums[2:], strict=False):
        new[0].add_(old[0])
        new[1].add_(old[1])
    return [squeeze, expand, time, position]


def bwd(grad: Tensor, x: Tensor, norm_scale: Tensor, norm_shift: Tensor, w1: Tensor, b1: Tensor, wt: Tensor,
        bt: Tensor, w2: Tensor, b2: Tensor, wd: Tensor, bd: Tensor, *, needs: list[bool],
        kept: Sequence[Tensor] = ()) -> list[Tensor | None]:
    """Clip by clip, so that the intermediates of one exist at a time."""
    dtype, tokens, grads = compute_dtype(x.dtype), array(x), array(grad)
    tune(SPACE, tokens, C=w1.shape[1], R=w1.shape[0], direction="bwd")
    part = _bottleneck(tokens.dtype, norm_scale, norm_shift, w1, b1, wt, bt, w2, b2)
    back = _Return(pack(part.squeeze, dtype, transposed=True), part.time.flip(0),
                   pack(part.expand, dtype, transposed=True), tap_rows(wd.flip(2, 3, 4), residual=True))
    grad_x, sums = result_like(tokens), list[tuple[Tensor, Tensor]]()
    for i in range(len(tokens)):
        grad_clip, clip, grad_x_clip, *parts = (t[i:i + 1] for t in (grads, tokens, grad_x, *kept))
        inner, x1 = parts or (part.down(clip, part.room(clip)), None)
        sums = _clip_bwd(grad_clip, clip, inner, x1, part, back, sums, grad_x_clip)
    (squeeze, e), (expand, grad_b2), (time, time_bias), (position, grad_bd) = sums
    reduced, precise = len(w1), w1.float()
    squeeze, e = squeeze[:reduced], e[:reduced]
    found = [column_products(precise, squeeze), precise_product(precise.T, e),
             squeeze * norm_scale.float() + e[:, None] * norm_shift.float(), e, time[:, :reduced].T,
             time_bias[:reduced], expand[:, :reduced], grad_b2, position.T.reshape(wd.shape), grad_bd]
    inputs = (norm_scale, norm_shift, w1, b1, wt, bt, w2, b2, wd, bd)
    return [grad_x.to(x.dtype), *(g.to(t.dtype) for g, t in zip(found, inputs, strict=True))]
