"""The products of panda_kernels/triton; the weights' gradients, plain products over all tokens, are torch's.

Inference (``run``) takes torch's second product as well: 73 G operations for 8 frames, 133 us on an H100 at the 550
TFLOP/s that cuBLAS reaches on 2184 rows, 163 us at the 450 assumed of Triton. The first, 18 G, takes 41 us with GELU in
its epilogue and as much, a launch more, by the library and a pass of 36 MB. The library chooses its kernel by the
number of rows, and for few of them may sum in another order: there a token's last bit can depend on how many go with
it. The op itself, ``fwd``, does not have that.
"""
from __future__ import annotations

import torch
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


Prepared = tuple[Tensor, Tensor, Tensor, Tensor]


def prepare(w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Prepared:
    """Weights as ``run`` reads them, for callers who keep them; the second transposed, a view."""
    return w1.contiguous(), b1.contiguous(), w2.contiguous().t(), b2.contiguous()


def run(prepared: Prepared, x: Tensor) -> Tensor:
    """Tokens ``[..., C]`` of the weights' dtype, checked by the caller."""
    w1, b1, w2, b2 = prepared
    return torch.addmm(b2, multiply(_rows(x), w1, b1, gelu=True), w2).view(*x.shape[:-1], -1)


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
