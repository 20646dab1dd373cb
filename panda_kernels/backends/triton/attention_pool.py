"""The kernels of panda_kernels/triton/attention_pool.py and attention_pool_grad.py on contiguous tensors."""
from __future__ import annotations

from torch import Tensor

from ...triton.attention_pool import pool
from ...triton.attention_pool_grad import pool_gradients
from . import refusals  # noqa: F401


def fwd(x: Tensor, queries: Tensor, cu_seqlens: Tensor | None, eps: float) -> Tensor:
    return pool(x.contiguous(), queries.contiguous(), _contiguous(cu_seqlens), eps)


def bwd(grad: Tensor, x: Tensor, queries: Tensor, cu_seqlens: Tensor | None, eps: float, *,
        needs: list[bool]) -> list[Tensor | None]:
    grads = pool_gradients(grad.contiguous(), x.contiguous(), queries.contiguous(), _contiguous(cu_seqlens), eps, needs)
    return [*grads, None][:len(needs)]


def _contiguous(cu_seqlens: Tensor | None) -> Tensor | None:
    return None if cu_seqlens is None else cu_seqlens.contiguous()
