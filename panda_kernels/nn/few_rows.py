"""A linear layer for the few rows behind a pooling, whose gradient a backend may have."""
from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import backends
from ..ops._autocast import is_autocasting
from ..ops._register import is_eager
from .has_backend import HasBackend


class FewRows(HasBackend, nn.Linear):
    """``torch.nn.Linear``; ``backend``, ``auto`` or a name of ``panda_kernels.backends.NAMES``, is its gradient's."""

    def forward(self, x: Tensor) -> Tensor:
        own = x, self.weight, self.bias
        plain = not torch.is_grad_enabled() or is_autocasting(x) or not is_eager(*own) or x.dtype != self.weight.dtype
        module = None if plain else backends.first("linear", "bwd", self.backend, own)
        return super().forward(x) if module is None else _Linear.apply(module, *own)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, module: ModuleType, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        grad_x, grad_weight, grad_bias = ctx.module.bwd(*rows, weight)
        return None, grad_x.view(x.shape), grad_weight, grad_bias
