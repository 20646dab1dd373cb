"""Gradients of weights that meet a few rows: fresh memory for them would cost more than to fill it."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import refusals  # noqa: F401
from ._arrays import array, result, weight_gradient


def bwd(grad: Tensor, x: Tensor, weight: Tensor) -> list[Tensor]:
    """Of ``x [rows, k]``, ``weight [n, k]`` and the bias, in their dtype."""
    grads = array(grad)
    # A sum over the weight's rows as the weight's gradient is one over those of x.
    grad_x, _ = weight_gradient(array(weight), grads.T.contiguous())
    grad_weight, grad_bias = weight_gradient(grads, array(x))
    return [g.to(x.dtype) for g in (grad_x.T, grad_weight, grad_bias)]


def outer(a: Tensor, b: Tensor) -> Tensor:
    """``[S, n, d]`` and ``[S, n, c]`` -> the sums of their products over S, ``[n, d, c]``."""
    left, right = a.permute(1, 2, 0), b.permute(1, 0, 2)
    return torch.bmm(left, right, out=result(*left.shape[:2], right.shape[2], dtype=a.dtype))


def joined(parts: Sequence[Tensor]) -> Tensor:
    first = parts[0]
    return torch.cat(list(parts), out=result(sum(map(len, parts)), *first.shape[1:], dtype=first.dtype))
