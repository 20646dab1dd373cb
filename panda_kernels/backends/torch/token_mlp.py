"""The projector by torch's own products."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import refusals  # noqa: F401
from ._arithmetic import linear, matmul, rows, total


def fwd(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return linear(F.gelu(linear(x, w1, b1)), w2, b2)


def bwd(grad: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *,
        needs: list[bool]) -> list[Tensor | None]:
    grad_x = grad_w1 = grad_b1 = grad_w2 = None
    tokens, grad_rows = rows(x), rows(grad)
    hidden = linear(tokens, w1, b1)
    if needs[3]:
        grad_w2 = matmul(grad_rows.T, F.gelu(hidden))
    if any(needs[:3]):
        grad_hidden = torch.ops.aten.gelu_backward(matmul(grad_rows, w2), hidden)
        grad_x = matmul(grad_hidden, w1).view(x.shape) if needs[0] else None
        grad_w1 = matmul(grad_hidden.T, tokens) if needs[1] else None
        grad_b1 = total(grad_hidden).to(b1.dtype) if needs[2] else None
    grad_b2 = total(grad_rows).to(b2.dtype) if needs[4] else None
    return [grad_x, grad_w1, grad_b1, grad_w2, grad_b2]
