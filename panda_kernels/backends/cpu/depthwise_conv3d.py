"""Rows staged once, 3x3x3 windows in registers (csrc/core/depthwise_body.inc)."""
from __future__ import annotations

import torch
from torch import Tensor

from ...tuning import Space
from . import refusals  # noqa: F401
from ._arrays import array, floats, kernels, result_like, tap_rows
from ._tuning import tune

SPACE = Space("cpu.depthwise_conv3d", stencil_rows=(4, 8, 16, 32), staged_channels=(64, 128, 256, 512))


def convolve(tokens: Tensor, taps: Tensor, bias: Tensor | None, kernel: tuple[int, ...],
             out: Tensor | None = None) -> Tensor:
    """Tokens ``[B, T, h, w, C]`` as the kernels want them, ``taps`` as :func:`tap_rows` makes them."""
    y = result_like(tokens) if out is None else out
    kernels.depthwise_conv3d(tokens, taps, bias, *kernel, y)
    return y


def gradient(tokens: Tensor, grad: Tensor, kernel: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Of the taps, ``[taps, C]``, and of the bias, float32, from that of the result."""
    channels = tokens.shape[-1]
    taps, bias = torch.empty(kernel[0] * kernel[1] * kernel[2], channels), torch.empty(channels)
    kernels.depthwise_gradient(tokens, grad, *kernel, taps, bias)
    return taps, bias


def fwd(x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool) -> Tensor:
    tokens, taps = array(x), tap_rows(weight, residual=residual)
    _tune(tokens, weight, "fwd")
    return convolve(tokens, taps, None if bias is None else floats(bias), weight.shape[2:]).to(x.dtype)


def bwd(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool, *,
        needs: list[bool]) -> list[Tensor | None]:
    kernel, grads = weight.shape[2:], array(grad)
    _tune(grads, weight, "bwd")
    grad_x = grad_weight = grad_bias = None
    if needs[0]:
        mirrored = tap_rows(weight.flip(2, 3, 4), residual=residual)
        grad_x = convolve(grads, mirrored, None, kernel).to(x.dtype)
    if any(needs[1:]):
        taps, sums = gradient(array(x), grads, kernel)
        grad_weight, grad_bias = taps.T.reshape(weight.shape).to(weight.dtype), sums.to(weight.dtype)
    return [grad_x, grad_weight, grad_bias]


def _tune(tokens: Tensor, weight: Tensor, direction: str) -> None:
    tune(SPACE, tokens, C=len(weight), kernel="x".join(map(str, weight.shape[2:])), direction=direction)
