"""The dense connection ``x3 = x2 + x0``: on a CPU its consumer sums, its gradients meet in memory of earlier results.

Sums of torch are fresh memory, as large as the tokens, and the system takes longer to give it than the sums to fill it
(docs/performance.md).
"""
from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backends
from ..ops._register import is_eager


class Sum(NamedTuple):
    """``x`` and, unless that is the sum already, what is still to be added, which has no gradient of its own: that of
    the sum is to be given to ``x``."""

    x: Tensor
    added: Tensor | None = None


def dense_connection(x2: Tensor, x0: Tensor, *, backend: str) -> tuple[Tensor, Sum]:
    """``x2`` for whoever else takes it, so that its gradients meet here, and x3."""
    same = is_eager(x2, x0) and x2.dtype == x0.dtype
    module = backends.first("dense_connection", "bwd", backend, (x2, x0)) if same else None
    if module is None:
        return x2, Sum(x2 + x0)
    x2, x3 = _Dense.apply(module, x2, x0)
    return x2, Sum(x3, x0.detach())


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, module: ModuleType, x2: Tensor, x0: Tensor) -> tuple[Tensor, Tensor]:
        ctx.module = module
        return x2.view_as(x2), x2.view_as(x2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x2: Tensor, grad_x3: Tensor) -> tuple[Tensor | None, ...]:
        # Torch adds to a gradient in place only where nothing else refers to its memory, as the base of a view would.
        alone = torch.ops.aten.set_.source_Tensor(torch.empty(0, dtype=grad_x3.dtype), grad_x3)
        return None, ctx.module.bwd(grad_x2, grad_x3), alone
