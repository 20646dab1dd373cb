"""The products of panda_kernels/triton; the weights' gradients, plain products over all tokens, are torch's."""
from __future__ import annotations

from torch import Tensor

from ...triton.matmul import multiply
from ...triton.token_mlp import hidden_and_gradient
from ..torch._arithmetic import matmul, total
from . import refusals  # noqa: F401


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def fwd(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    hidden = multiply(_rows(x), w1.contiguous(), b1.contiguous(), gelu=True)
    return multiply(hidden, w2.contiguous(), b2.contiguous()).view(*x.shape[:-1], -1)


def bwd(grad: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *,
        needs: list[bool]) -> list[Tensor | None]:
    grads: list[Tensor | None] = [None] * 5
    tokens, outer, w1 = _rows(x), _rows(grad), w1.contiguous()
    if any(needs[:4]):
        activated, hidden = hidden_and_gradient(tokens, w1, b1.contiguous(), outer, w2.contiguous())
        grads[0] = multiply(hidden, w1, transposed=True).view(x.shape) if needs[0] else None
        grads[1] = matmul(hidden.T, tokens) if needs[1] else None
        grads[2] = total(hidden).to(b1.dtype) if needs[2] else None
        grads[3] = matmul(outer.T, activated) if needs[3] else None
    grads[4] = total(outer).to(b2.dtype) if needs[4] else None
    return grads
