"""The dtypes that this backend computes in, and the products and norms that several ops share."""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import has_products


def wide(x: Tensor) -> torch.dtype:
    """Where statistics, softmax and sums over many tokens are computed."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def as_float32(x: Tensor) -> bool:
    """Whether to compute products of ``x`` in float32 and round them: the same sums, and a hundred times faster."""
    return x.device.type == "cpu" and not has_products(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if as_float32(x):
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
    return F.linear(x, weight, bias)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    return (a.float() @ b.float()).to(a.dtype) if as_float32(a) else a @ b


def rows(x: Tensor) -> Tensor:
    """``[..., C]`` -> ``[tokens, C]``."""
    return x.reshape(-1, x.shape[-1])


def total(x: Tensor) -> Tensor:
    """The sum over all tokens, ``[..., C]`` -> ``[C]``, in the wide dtype: a bias's gradient.

    Of about as many sums as each has tokens: torch's own runs down the tokens in a few long chains, whose rounding
    shows in what is small beside its terms.
    """
    tokens = rows(x)
    length = math.isqrt(len(tokens))
    whole = len(tokens) // length * length
    sums = tokens[:whole].unflatten(0, (-1, length)).sum(1, dtype=wide(x)).sum(0)
    return sums + tokens[whole:].sum(0, dtype=wide(x))


def for_each(needs: Sequence[bool], *grads: Tensor | None) -> list[Tensor | None]:
    """``grads``, and None for the tensors behind those."""
    return [*grads, *[None] * (len(needs) - len(grads))]


def normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm without affine in the wide dtype, with the mean and the reciprocal deviation its gradient needs."""
    return torch.native_layer_norm(x.to(wide(x)), x.shape[-1:], None, None, eps)


def normalise_bwd(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """The gradient of :func:`normalise` with respect to ``x``, in the wide dtype."""
    return torch.ops.aten.native_layer_norm_backward(
        grad, x.to(grad.dtype), x.shape[-1:], mean, rstd, None, None, [True, False, False])[0]
