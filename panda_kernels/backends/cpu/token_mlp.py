"""Two products by blocks of rows, GELU in the epilogue of the first, its output never larger than a block."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...tuning import Space
from . import refusals  # noqa: F401
from ._arrays import array, compute_dtype, floats, kernels, pack, product, result, weight_gradient
from ._tuning import tune

SPACE = Space("cpu.token_mlp", band_tokens=(256, 512, 1024, 2048), product_rows=(128, 256, 512, 1024))

Prepared = tuple[Tensor, Tensor, Tensor, Tensor]


def fwd(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return run(prepare(w1, b1, w2, b2), x)


def prepare(w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Prepared:
    """Weights packed, for callers who keep them."""
    dtype = compute_dtype(w1.dtype)
    return pack(w1, dtype), floats(b1), pack(w2, dtype), floats(b2)


def run(prepared: Prepared, x: Tensor) -> Tensor:
    """Tokens ``[..., C]`` of the weights' dtype, checked by the caller."""
    tokens = array(x).reshape(-1, x.shape[-1])
    y = result(tokens.shape[0], len(prepared[3]), dtype=tokens.dtype)
    tune(SPACE, tokens, C=tokens.shape[1], hidden=len(prepared[1]), out=len(prepared[3]), direction="fwd")
    kernels.token_mlp(tokens, *prepared, y)
    return y.view(*x.shape[:-1], -1).to(x.dtype)


def bwd(grad: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *,
        needs: list[bool]) -> list[Tensor | None]:
    dtype, tokens, grads = compute_dtype(x.dtype), array(x).reshape(-1, x.shape[-1]), array(grad).reshape(-1, len(w2))
    tune(SPACE, tokens, C=tokens.shape[1], hidden=len(w1), out=len(w2), direction="bwd")
    hidden = product(tokens, pack(w1, dtype), len(w1), bias=floats(b1))
    grad_w2, grad_b2 = weight_gradient(grads, F.gelu(hidden))
    grad_gelu = product(grads, pack(w2, dtype, transposed=True), len(w1))
    grad_hidden = torch.ops.aten.gelu_backward(grad_gelu, hidden)
    del hidden, grad_gelu
    grad_w1, grad_b1 = weight_gradient(grad_hidden, tokens)
    grad_x = product(grad_hidden, pack(w1, dtype, transposed=True), x.shape[-1]).view(x.shape) if needs[0] else None
    return [None if g is None else g.to(x.dtype) for g in (grad_x, grad_w1, grad_b1, grad_w2, grad_b2)]
