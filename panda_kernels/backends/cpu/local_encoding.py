"""LSTE streamed by bands of image rows (csrc/core/local_encoding.cpp), BatchNorm folded into the first product.

The gradient recomputes the bottleneck and x1, or has them kept by the forward (docs/numerics.md).
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...tuning import Space
from . import refusals  # noqa: F401
from ._arrays import (
    PANEL,
    array,
    compute_dtype,
    floats,
    fold_norm,
    kernels,
    pack,
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


def keep(x: Tensor, norm_scale: Tensor, norm_shift: Tensor, w1: Tensor, b1: Tensor, wt: Tensor, bt: Tensor, w2: Tensor,
         b2: Tensor, wd: Tensor, bd: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The same bits, not streamed: the bottleneck and x1 are kept whole."""
    tokens = array(x)
    tune(SPACE, tokens, C=w1.shape[1], R=w1.shape[0], direction="fwd")
    down_up = _DownUp.of(tokens.dtype, _pad(norm_scale, norm_shift, w1, b1, wt, bt, w2), b2)
    kept, y = [down_up.room(tokens), result_like(tokens)], result_like(tokens)
    position, offset = tap_rows(wd, residual=True), floats(bd)
    for i in range(len(tokens)):
        clip, inner, x1, y_clip = (t[i:i + 1] for t in (tokens, *kept, y))
        down_up(clip, inner, x1)
        convolve(x1, position, offset, POSITION, out=y_clip)
    return y.to(x.dtype), kept


class _Padded(NamedTuple):
    """The bottleneck's parameters with the norm in them, widened to whole panels by channels of zeros."""

    squeeze: Tensor
    squeeze_bias: Tensor
    time: Tensor
    time_bias: Tensor
    expand: Tensor

    def over_time(self, inner: Tensor) -> Tensor:
        return convolve(inner, self.time, self.time_bias, OVER_TIME)


def _pad(norm_scale: Tensor, norm_shift: Tensor, w1: Tensor, b1: Tensor, wt: Tensor, bt: Tensor,
         w2: Tensor) -> _Padded:
    more = -len(w1) % PANEL
    weight, bias = fold_norm(norm_scale, norm_shift, w1)
    return _Padded(F.pad(weight, (0, 0, 0, more)), F.pad(bias + b1.float(), (0, more)),
                   F.pad(wt.float(), (0, 0, 0, more)).T.contiguous(), F.pad(floats(bt), (0, more)),
                   F.pad(w2, (0, more)))


class _DownUp(NamedTuple):
    """From the tokens of one clip to the bottleneck and x1."""

    padded: _Padded
    squeeze: Tensor
    expand: Tensor
    expand_bias: Tensor

    @classmethod
    def of(cls, dtype: torch.dtype, padded: _Padded, b2: Tensor) -> _DownUp:
        return cls(padded, pack(padded.squeeze, dtype), pack(padded.expand, dtype), floats(b2))

    def room(self, tokens: Tensor) -> Tensor:
        """For the bottleneck of ``tokens``."""
        return result(*tokens.shape[:-1], len(self.padded.squeeze_bias), dtype=tokens.dtype)

    def __call__(self, x: Tensor, inner: Tensor, x1: Tensor) -> None:
        rows, width, channels = _rows(x), inner.shape[-1], x.shape[-1]
        product(rows, self.squeeze, width, bias=self.padded.squeeze_bias, out=_rows(inner))
        mixed = _rows(self.padded.over_time(inner))
        product(mixed, self.expand, channels, bias=self.expand_bias, residual=rows, out=_rows(x1))


class _Return(NamedTuple):
    """What gradients return through."""

    squeeze: Tensor
    time: Tensor
    expand: Tensor
    position: Tensor


def _clip_bwd(grad: Tensor, x: Tensor, kept: list[Tensor], padded: _Padded, back: _Return,
              sums: list[tuple[Tensor, Tensor]], grad_x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Writes ``grad_x`` of one clip ``[1, T, h, w, C]``, whose bottleneck and x1 ``kept`` is left without; adds to the
    sums of both products' gradients, and of both convolutions'."""
    position = gradient(kept.pop(), grad, POSITION)
    inner = kept.pop()
    grad_x1 = _rows(convolve(grad, back.position, None, POSITION, out=grad_x))
    expand = weight_gradient(grad_x1, _rows(padded.over_time(inner)), sums[1] if sums else None)
    grad_mixed = product(grad_x1, back.expand, inner.shape[-1]).view(inner.shape)
    time = gradient(inner, grad_mixed, OVER_TIME)
    grad_inner = _rows(convolve(grad_mixed, back.time, None, OVER_TIME))
    del inner, grad_mixed
    product(grad_inner, back.squeeze, x.shape[-1], residual=grad_x1, out=grad_x1)
    squeeze = weight_gradient(grad_inner, _rows(x), sums[0] if sums else None)
    for new, old in zip((time, position), sums[2:], strict=False):
        new[0].add_(old[0])
        new[1].add_(old[1])
    return [squeeze, expand, time, position]


def _rows(grid: Tensor) -> Tensor:
    return grid.view(-1, grid.shape[-1])


def bwd(grad: Tensor, x: Tensor, norm_scale: Tensor, norm_shift: Tensor, w1: Tensor, b1: Tensor, wt: Tensor,
        bt: Tensor, w2: Tensor, b2: Tensor, wd: Tensor, bd: Tensor, *, needs: list[bool],
        kept: Sequence[Tensor] = ()) -> list[Tensor | None]:
    """Clip by clip, so that the intermediates of one exist at a time."""
    dtype, tokens, grads = compute_dtype(x.dtype), array(x), array(grad)
    tune(SPACE, tokens, C=w1.shape[1], R=w1.shape[0], direction="bwd")
    padded = _pad(norm_scale, norm_shift, w1, b1, wt, bt, w2)
    back = _Return(pack(padded.squeeze, dtype, transposed=True), padded.time.flip(0),
                   pack(padded.expand, dtype, transposed=True), tap_rows(wd.flip(2, 3, 4), residual=True))
    again = None if kept else _DownUp.of(dtype, padded, b2)
    grad_x, sums = result_like(tokens), list[tuple[Tensor, Tensor]]()
    for i in range(len(tokens)):
        grad_clip, clip, grad_x_clip, *held = (t[i:i + 1] for t in (grads, tokens, grad_x, *kept))
        if again is not None:
            held = [again.room(clip), result_like(clip)]
            again(clip, *held)
        sums = _clip_bwd(grad_clip, clip, held, padded, back, sums, grad_x_clip)
    (squeeze, e), (expand, grad_b2), (time, time_bias), (position, grad_bd) = sums
    reduced, precise = len(w1), w1.float()
    squeeze, e = squeeze[:reduced], e[:reduced]
    found = [(precise * squeeze).sum(0), e.double() @ precise.double(),
             squeeze * norm_scale.float() + e[:, None] * norm_shift.float(), e, time[:, :reduced].T,
             time_bias[:reduced], expand[:, :reduced], grad_b2, position.T.reshape(wd.shape), grad_bd]
    inputs = (norm_scale, norm_shift, w1, b1, wt, bt, w2, b2, wd, bd)
    return [grad_x.to(x.dtype), *(g.to(t.dtype) for g, t in zip(found, inputs, strict=True))]
