"""Gradients of a linear layer that takes a few rows: fresh memory for the weight's would cost more than to fill it."""
from __future__ import annotations

from torch import Tensor

from . import refusals  # noqa: F401
from ._arrays import array, weight_gradient


def bwd(grad: Tensor, x: Tensor, weight: Tensor) -> list[Tensor]:
    """Of ``x [rows, k]``, ``weight [n, k]`` and the bias, in their dtype."""
    grads = array(grad)
    # A sum over the weight's rows as the weight's gradient is one over those of x.
    grad_x, _ = weight_gradient(array(weight), grads.T.contiguous())
    grad_weight, grad_bias = weight_gradient(grads, array(x))
    return [g.to(x.dtype) for g in (grad_x.T, grad_weight, grad_bias)]
