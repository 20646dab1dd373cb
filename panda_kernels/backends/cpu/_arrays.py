"""Tensors as the compiled core wants them: contiguous, float32 or bfloat16, weights folded and packed."""
from __future__ import annotations

import torch
from torch import Tensor

kernels = torch.ops.panda_kernels_cpu


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a call in ``dtype`` computes in: float16 products have no fast path on a CPU, so they are float32."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def array(x: Tensor) -> Tensor:
    return x.to(compute_dtype(x.dtype)).contiguous()


def floats(x: Tensor) -> Tensor:
    return x.float().contiguous()


def fold_norm(scale: Tensor, shift: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A product ``[n, k]`` with the affine of the norm before it: its weight and what it adds, float32."""
    return weight.float() * scale.float(), precise_product(weight, shift)


def precise_product(weight: Tensor, x: Tensor) -> Tensor:
    """``weight [n, k] @ x`` in float64, rounded to float32; a few rows at a time, as no whole copy is ever given back
    to the system."""
    wide = x.double()
    return torch.cat([(rows.double() @ wide).float() for rows in weight.split(128)])


def pack(weight: Tensor, dtype: torch.dtype, *, transposed: bool = False) -> Tensor:
    """One weight ``[n, k]``, or a stack of them, laid out for the products; ``transposed`` packs ``[k, n]``."""
    stack = weight.to(dtype)
    stack = stack[None] if stack.ndim == 2 else stack
    matrices, n, k = stack.shape if not transposed else (stack.shape[0], stack.shape[2], stack.shape[1])
    packed = torch.empty(matrices * kernels.packed_bytes(dtype == torch.bfloat16, n, k), dtype=torch.uint8)
    kernels.pack(stack, matrices, transposed, packed)
    return packed


def product(x: Tensor, packed: Tensor, outputs: int, *, bias: Tensor | None = None,
            residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """``x w^T + bias + residual`` for rows ``x [rows, k]`` and a packed weight ``[outputs, k]``."""
    y = torch.empty(x.shape[0], outputs, dtype=x.dtype) if out is None else out
    kernels.product(x, packed, bias, residual, y)
    return y


def weight_gradient(grad: Tensor, x: Tensor, sums: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """``grad^T x`` and the sum of the rows of ``grad``, float32, in an order that threads do not change; added to
    ``sums``, if there are any."""
    weight, bias = (torch.empty(grad.shape[1], x.shape[1]), torch.empty(grad.shape[1])) if sums is None else sums
    kernels.weight_gradient(grad, x, sums is not None, weight, bias)
    return weight, bias


def tap_rows(weight: Tensor, *, residual: bool) -> Tensor:
    """``[C, 1, kt, kh, kw]`` -> ``[taps, C]`` float32, the identity of a residual added to the centre tap."""
    taps = weight.float().flatten(1).T.contiguous()
    if residual:
        taps[taps.shape[0] // 2] += 1.0
    return taps
