"""The stencil of panda_kernels/triton/depthwise_conv3d.py, forward and for the tokens' gradient."""
from __future__ import annotations

from torch import Tensor

from ...triton.depthwise_conv3d import convolve, parameter_gradients
from . import refusals  # noqa: F401


def tap_rows(weight: Tensor) -> Tensor:
    """``[kt * kh * kw, C]``, channels contiguous as in the tokens: a copy of 27 rows."""
    return weight.reshape(weight.shape[0], -1).t().contiguous()


def fwd(x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool) -> Tensor:
    bias = None if bias is None else bias.contiguous()
    return convolve(x.contiguous(), tap_rows(weight), bias, weight.shape[2:], mirrored=False, residual=residual)


def bwd(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool, *,
        needs: list[bool]) -> list[Tensor | None]:
    grad, kernel = grad.contiguous(), weight.shape[2:]
    grads: list[Tensor | None] = [None] * len(needs)
    if needs[0]:
        grads[0] = convolve(grad, tap_rows(weight), None, kernel, mirrored=True, residual=residual)
    if any(needs[1:]):
        taps, offset = parameter_gradients(grad, x.contiguous(), kernel)
        grads[1:] = [taps.t().reshape(weight.shape).to(weight.dtype), offset.to(weight.dtype)][:len(needs) - 1]
    return grads
