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
from ..torch._arithmetic import for_each
from . import refusals  # noqa: F401
from ._arrays import (
    PANEL,
    added_by,
    array,
    column_products,
    compute_dtype,
    floats,
    kernels,
    pack,
    product,
    result,
    result_like,
    scale_columns,
    tap_rows,
    weight_gradient,
)
from ._tuning import tune
from .depthwise_conv3d import convolve, gradient
from .first_product import OfPixels, OfTokens, first_product, rows

SPACE = Space("cpu.local_encoding", band_tokens=(256, 512, 1024, 2048), product_rows=(256, 512, 1024),
              staged_channels=(128, 256, 512))

OVER_TIME, POSITION = (3, 1, 1), (3, 3, 3)


def streamed_weights(dtype: torch.dtype, wt: Tensor, bt: Tensor, w2: Tensor, b2: Tensor, wd: Tensor,
                     bd: Tensor) -> list[Tensor]:
    """What follows the first product, in the order of ``local_weights`` in csrc/bindings.cpp."""
    return [wt.float().T.contiguous(), floats(bt), pack(w2, dtype), floats(b2), tap_rows(wd, residual=True), floats(bd)]


def fwd(x: Tensor, norm_scale: Tensor, norm_shift: Tensor, w1: Tensor, b1: Tensor, wt: Tensor, bt: Tensor, w2: Tensor,
        b2: Tensor, wd: Tensor, bd: Tensor, pixels: Tensor | None, embedding: Tensor | None,
        present: Tensor | None) -> Tensor:
    if pixels is not None:
        return keep(x, norm_scale, norm_shift, w1, b1, wt, bt, w2, b2, wd, bd, pixels, embedding, present)[0]
    dtype = compute_dtype(x.dtype)
    tokens = array(x)
    y = result_like(tokens)
    weight, bias = scale_columns(w1, norm_scale), added_by(norm_shift, w1)
    weights = [pack(weight, dtype), bias + b1.float(), *streamed_weights(dtype, wt, bt, w2, b2, wd, bd)]
    tune(SPACE, tokens, C=w1.shape[1], R=w1.shape[0], direction="fwd")
    kernels.local_encoding(tokens, weights, w1.shape[0], y)
    return y.to(x.dtype)


@dataclass(frozen=True)
class _Bottleneck:
    """From the tokens of clips ``[B, T, h, w, C]`` to x1; channels of zeros fill the last panel."""

    dtype: torch.dtype
    first: OfTokens | OfPixels
    time: Tensor
    time_bias: Tensor
    expand: Tensor
    expand_bias: Tensor

    @functools.cached_property
    def _packed_expand(self) -> Tensor:
        return pack(self.expand, self.dtype)

    def room(self, x: Tensor) -> Tensor:
        return result(*x.shape[:-1], len(self.time_bias), dtype=self.dtype)

    def mix(self, inner: Tensor) -> Tensor:
        return convolve(inner, self.time, self.time_bias, OVER_TIME)

    def up(self, mixed: Tensor, x: Tensor, out: Tensor) -> Tensor:
        product(rows(mixed), self._packed_expand, x.shape[-1], bias=self.expand_bias, residual=rows(x), out=rows(out))
        return out


def _bottleneck(x: Tensor, norm_scale: Tensor, norm_shift: Tensor, w1: Tensor, b1: Tensor, wt: Tensor, bt: Tensor,
                w2: Tensor, b2: Tensor, *source: Tensor | None, needs_pixels: bool = False) -> _Bottleneck:
    more = -len(w1) % PANEL
    weight, bias = scale_columns(w1, norm_scale), added_by(norm_shift, w1)
    first = first_product(x, source, F.pad(weight, (0, 0, 0, more)), F.pad(bias + b1.float(), (0, more)),
                          needs_pixels=needs_pixels)
    return _Bottleneck(x.dtype, first, F.pad(wt.float(), (0, 0, 0, more)).T.contiguous(), F.pad(floats(bt), (0, more)),
                       F.pad(w2, (0, more)), floats(b2))


def keep(x: Tensor, norm_scale: Tensor, norm_shift: Tensor, w1: Tensor, b1: Tensor, wt: Tensor, bt: Tensor, w2: Tensor,
         b2: Tensor, wd: Tensor, bd: Tensor, *source: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """The same bits, the bottleneck of all tokens and x1 kept."""
    tokens = array(x)
    tune(SPACE, tokens, C=w1.shape[1], R=w1.shape[0], direction="fwd")
    part = _bottleneck(tokens, norm_scale, norm_shift, w1, b1, wt, bt, w2, b2, *source)
    y, inner, x1 = result_like(tokens), part.room(tokens), result_like(tokens)
    part.up(part.mix(part.first.write(slice(None), inner)), tokens, x1)
    convolve(x1, tap_rows(wd, residual=True), floats(bd), POSITION, out=y)
    return y.to(x.dtype), [inner, x1]


class _Return(NamedTuple):
    """What gradients return through."""

    time: Tensor
    expand: Tensor
    position: Tensor


def _clip_bwd(grad: Tensor, x: Tensor, inner: Tensor, x1: Tensor | None, part: _Bottleneck, back: _Return,
              sums: list[tuple[Tensor, Tensor]], grad_x: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The gradient of the bottleneck of one clip ``[1, T, h, w, C]``, and the sums of those of the product up and of
    both convolutions, with it added. ``grad_x`` gets what does not come through the bottleneck."""
    mixed = part.mix(inner)
    position = gradient(part.up(mixed, x, result_like(x)) if x1 is None else x1, grad, POSITION)
    grad_x1 = rows(convolve(grad, back.position, None, POSITION, out=grad_x))
    expand = weight_gradient(grad_x1, rows(mixed), sums[0] if sums else None)
    del mixed
    grad_mixed = product(grad_x1, back.expand, inner.shape[-1]).view(inner.shape)
    time = gradient(inner, grad_mixed, OVER_TIME)
    for new, old in zip((time, position), sums[1:], strict=False):
        new[0].add_(old[0])
        new[1].add_(old[1])
    return convolve(grad_mixed, back.time, None, OVER_TIME), [expand, time, position]


def bwd(grad: Tensor, x: Tensor, norm_scale: Tensor, norm_shift: Tensor, w1: Tensor, b1: Tensor, wt: Tensor,
        bt: Tensor, w2: Tensor, b2: Tensor, wd: Tensor, bd: Tensor, *source: Tensor | None, needs: list[bool],
        kept: Sequence[Tensor] = ()) -> list[Tensor | None]:
    """Clip by clip, so that the intermediates of one exist at a time."""
    dtype, tokens, grads = compute_dtype(x.dtype), array(x), array(grad)
    tune(SPACE, tokens, C=w1.shape[1], R=w1.shape[0], direction="bwd")
    part = _bottleneck(tokens, norm_scale, norm_shift, w1, b1, wt, bt, w2, b2, *source, needs_pixels=any(needs[11:12]))
    back = _Return(part.time.flip(0), pack(part.expand, dtype, transposed=True),
                   tap_rows(wd.flip(2, 3, 4), residual=True))
    grad_x, sums = result_like(tokens), list[tuple[Tensor, Tensor]]()
    for i in range(len(tokens)):
        grad_clip, clip, grad_x_clip, *parts = (t[i:i + 1] for t in (grads, tokens, grad_x, *kept))
        inner, x1 = parts or (part.first.write(slice(i, i + 1), part.room(clip)), None)
        grad_inner, sums = _clip_bwd(grad_clip, clip, inner, x1, part, back, sums, grad_x_clip)
        part.first.take_back(slice(i, i + 1), grad_inner, grad_x_clip)
    squeeze, e, of_source = part.first.gradients()
    (expand, grad_b2), (time, time_bias), (position, grad_bd) = sums
    reduced, precise = len(w1), w1.float()
    squeeze, e = squeeze[:reduced], e[:reduced]
    found = [column_products(precise, squeeze), column_products(precise, e[:, None]),
             squeeze * norm_scale.float() + e[:, None] * norm_shift.float(), e, time[:, :reduced].T,
             time_bias[:reduced], expand[:, :reduced], grad_b2, position.T.reshape(wd.shape), grad_bd]
    inputs = (norm_scale, norm_shift, w1, b1, wt, bt, w2, b2, wd, bd)
    return for_each(needs, grad_x.to(x.dtype), *(g.to(t.dtype) for g, t in zip(found, inputs, strict=True)), *of_source)
