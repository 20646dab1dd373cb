"""One pass over the tokens, partial softmaxes merged in order (csrc/core/pooling_body.inc); two for a gradient."""
from __future__ import annotations

import torch
from torch import Tensor

from . import refusals  # noqa: F401
from ._arrays import array, floats, kernels, result_like


def _offsets(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    return torch.arange(x.shape[0] + 1) * x.shape[1] if cu_seqlens is None else cu_seqlens.long().contiguous()


def fwd(x: Tensor, queries: Tensor, cu_seqlens: Tensor | None, eps: float) -> Tensor:
    offsets = _offsets(x, cu_seqlens)
    z = torch.empty(len(offsets) - 1, queries.shape[-2], x.shape[-1])
    kernels.attention_pool(array(x), floats(queries), offsets, eps, z)
    return z.to(x.dtype)


def bwd(grad: Tensor, x: Tensor, queries: Tensor, cu_seqlens: Tensor | None, eps: float, *,
        needs: list[bool]) -> list[Tensor | None]:
    tokens, offsets = array(x).view(-1, x.shape[-1]), _offsets(x, cu_seqlens)
    grad_x, grad_queries = result_like(tokens), torch.empty(*queries.shape)
    kernels.attention_pool_gradient(floats(grad), tokens, floats(queries), offsets, eps, grad_x, grad_queries)
    return [grad_x.view(x.shape).to(x.dtype), grad_queries.to(queries.dtype)]
