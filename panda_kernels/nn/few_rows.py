"""Products of weights with the few rows behind a pooling, whose gradients a backend may have.

The weights' own are as large as the weights, and the system takes longer to give torch memory for them than the
products to fill it (docs/performance.md).
"""
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


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str) -> Tensor:
    """``torch.nn.functional.linear``."""
    module = _server(backend, *(t for t in (x, weight, bias) if t is not None))
    return F.linear(x, weight, bias) if module is None else _Linear.apply(module, x, weight, bias)


def per_head(x: Tensor, weight: Tensor, *, backend: str, transposed: bool = False) -> Tensor:
    """``x [S, n, c]`` and ``weight [n, d, c]`` -> ``[S, n, d]``; ``[S, n, d]`` -> ``[S, n, c]`` if ``transposed``."""
    module = _server(backend, x, weight)
    return _each_head(x, weight, transposed) if module is None else _Heads.apply(module, x, weight, transposed)


def chunks(weight: Tensor, count: int, *, backend: str) -> tuple[Tensor, ...]:
    """``weight.chunk(count)``."""
    module = _server(backend, weight)
    return weight.chunk(count) if module is None else _Chunks.apply(module, weight, count)


class FewRows(HasBackend, nn.Linear):
    """``torch.nn.Linear``; ``backend``, ``auto`` or a name of ``panda_kernels.backends.NAMES``, is its gradient's."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, backend=self.backend)


def _server(backend: str, *tensors: Tensor) -> ModuleType | None:
    first = tensors[0]
    if not torch.is_grad_enabled() or is_autocasting(first) or not is_eager(*tensors):
        return None
    return backends.first("linear", "bwd", backend, tensors) if len({t.dtype for t in tensors}) == 1 else None


def _each_head(x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    return torch.einsum("snd,ndc->snc" if transposed else "snc,ndc->snd", x, weight)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, module: ModuleType, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.module, ctx.has_bias = module, bias is not None
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        grad_x, grad_weight, grad_bias = ctx.module.bwd(*rows, weight)
        return None, grad_x.view(x.shape), grad_weight, grad_bias if ctx.has_bias else None


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, module: ModuleType, x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
        ctx.module, ctx.transposed = module, transposed
        ctx.save_for_backward(x, weight)
        return _each_head(x, weight, transposed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_weight = ctx.module.outer(x, grad) if ctx.transposed else ctx.module.outer(grad, x)
        return None, _each_head(grad, weight, not ctx.transposed), grad_weight, None


class _Chunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, module: ModuleType, weight: Tensor, count: int) -> tuple[Tensor, ...]:
        ctx.module = module
        return weight.chunk(count)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, ctx.module.joined(grads), None
