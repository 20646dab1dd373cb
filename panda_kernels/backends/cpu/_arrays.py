"""Tensors as the compiled core wants them: contiguous, float32 or bfloat16, weights folded and packed."""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

kernels = torch.ops.panda_kernels_cpu
PANEL = 32  # channels that the products take at a time
LARGE = 1 << 20  # bytes; the allocator itself keeps what is smaller


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a call in ``dtype`` computes in: float16 products have no fast path on a CPU, so they are float32."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def array(x: Tensor) -> Tensor:
    return x.to(compute_dtype(x.dtype)).contiguous()


def result(*sizes: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised; a large one in memory that earlier ones have left (csrc/core/pages.h)."""
    if math.prod(sizes) * dtype.itemsize < LARGE:
        return torch.empty(*sizes, dtype=dtype)
    return kernels.result(sizes, dtype)


def result_like(x: Tensor) -> Tensor:
    return result(*x.shape, dtype=x.dtype)


def copied(x: Tensor, dtype: torch.dtype) -> Tensor:
    return result(*x.shape, dtype=dtype).copy_(x)


def floats(x: Tensor) -> Tensor:
    return x.float().contiguous()


def scale_columns(weight: Tensor, scale: Tensor) -> Tensor:
    """A product ``[n, k]`` with the scale of the norm before it, float32."""
    scaled = result(*weight.shape, dtype=torch.float32)
    if weight.dtype == torch.float32:
        return torch.mul(weight, scale.float(), out=scaled)
    return scaled.copy_(weight).mul_(scale.float())  # of two types torch would make a copy of its own


def added_by(shift: Tensor, weight: Tensor) -> Tensor:
    """What the shift of a norm adds to the product ``[n, k]`` behind it: ``weight @ shift``, float32."""
    y = torch.empty(1, 1, len(weight))
    kernels.linear(floats(shift)[None, None], array(weight)[None], torch.zeros(len(weight)), False, y)
    return y[0, 0]


def precise_product(weight: Tensor, x: Tensor) -> Tensor:
    """``weight [n, k] @ x`` in float64, rounded to float32; a few rows at a time, as no whole copy is ever given back
    to the system."""
    wide, some = copied(x, torch.float64), result(128, weight.shape[1], dtype=torch.float64)
    y = result(len(weight), *x.shape[1:], dtype=torch.float32)
    for rows, out in zip(weight.split(128), y.split(128), strict=True):
        out.copy_(some[:len(rows)].copy_(rows) @ wide)
    return y


def column_products(x: Tensor, y: Tensor) -> Tensor:
    """``(x * y).sum(0)``, a few rows at a time."""
    return torch.stack([(a * b).sum(0) for a, b in zip(x.split(128), y.split(128), strict=True)]).sum(0)


def pack(weight: Tensor, dtype: torch.dtype, *, transposed: bool = False) -> Tensor:
    """One weight ``[n, k]``, or a stack of them, laid out for the products; ``transposed`` packs ``[k, n]``."""
    return pack_all(dtype, (weight, transposed))[0]


def pack_all(dtype: torch.dtype, *weights: tuple[Tensor, bool]) -> Sequence[Tensor]:
    """:func:`pack` of weights, and whether transposed, into one piece of memory."""
    stacks = [(w if w.ndim == 3 else w[None], transposed) for w, transposed in weights]
    sizes = []
    for stack, transposed in stacks:
        matrices, n, k = stack.mT.shape if transposed else stack.shape
        sizes.append(matrices * kernels.packed_bytes(dtype == torch.bfloat16, n, k))
    parts = result(sum(sizes), dtype=torch.uint8).split(sizes)
    for (stack, transposed), part in zip(stacks, parts, strict=True):
        same = stack.dtype == dtype
        kernels.pack(stack if same else copied(stack, dtype), len(stack), transposed, part)
    return parts


def product(x: Tensor, packed: Tensor, outputs: int, *, bias: Tensor | None = None,
            residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """``x w^T + bias + residual`` for rows ``x [rows, k]`` and a packed weight ``[outputs, k]``."""
    y = result(x.shape[0], outputs, dtype=x.dtype) if out is None else out
    kernels.product(x, packed, bias, residual, y)
    return y


def weight_gradient(grad: Tensor, x: Tensor, sums: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """``grad^T x`` and the sum of the rows of ``grad``, float32, in an order that threads do not change; added to
    ``sums``, if there are any."""
    weight, bias = sums or (result(grad.shape[1], x.shape[1], dtype=torch.float32), torch.empty(grad.shape[1]))
    kernels.weight_gradient(grad, x, sums is not None, weight, bias)
    return weight, bias


def tap_rows(weight: Tensor, *, residual: bool) -> Tensor:
    """``[C, 1, kt, kh, kw]`` -> ``[taps, C]`` float32, the identity of a residual added to the centre tap."""
    taps = weight.float().flatten(1).T.contiguous()
    if residual:
        taps[taps.shape[0] // 2] += 1.0
    return taps
