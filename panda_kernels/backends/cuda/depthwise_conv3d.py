"""The 3x3x3 stencil of csrc/cuda/depthwise_conv3d.cu, forward and for the tokens' gradient."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import cuda
from ..triton.depthwise_conv3d import tap_rows
from . import aligned

SEGMENTS = 32  # shares of the frames in the weight gradient, at most: 1536 blocks with 1024 channels


def refusals(inputs: Sequence[Any]) -> list[str]:
    x, weight = inputs[:2]
    reasons = cuda.refusals(inputs) + cuda.partial_vectors(x)
    if weight.shape[2:] != (3, 3, 3):
        reasons.append(f"a kernel of {' x '.join(map(str, weight.shape[2:]))}, not 3 x 3 x 3")
    return reasons


def stencil(x: Tensor, taps: Tensor, bias: Tensor | None, *, residual: bool, mirrored: bool = False) -> Tensor:
    """The convolution of contiguous ``x [B, T, h, w, C]`` with ``taps [27, C]``, plus x if ``residual``."""
    y = torch.empty_like(x)
    torch.ops.panda_kernels_cuda.stencil(x, taps, bias, None, mirrored, residual, y, None)
    return y


def convolve_and_add(x: Tensor, taps: Tensor, bias: Tensor, kernel: tuple[int, ...],
                     dense: Tensor) -> tuple[Tensor, Tensor]:
    """As Triton's function of that name: the stencil with its residual, and the sum of that and ``dense``, whose rows
    may be those of a wider matrix."""
    y, total = torch.empty_like(x), torch.empty_like(x)
    torch.ops.panda_kernels_cuda.stencil(x, taps, bias, dense, False, True, y, total)
    return y, total


def fwd(x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool) -> Tensor:
    return stencil(aligned(x), tap_rows(weight), None if bias is None else aligned(bias), residual=residual)


def bwd(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool, *,
        needs: list[bool]) -> list[Tensor | None]:
    grad = aligned(grad)
    grads: list[Tensor | None] = [None] * len(needs)
    if needs[0]:
        grads[0] = stencil(grad, tap_rows(weight), None, residual=residual, mirrored=True)
    if any(needs[1:]):
        segments = min(SEGMENTS, x.shape[0] * x.shape[1])
        partial = torch.empty(segments, 28, x.shape[-1], dtype=torch.float32, device=x.device)
        torch.ops.panda_kernels_cuda.stencil_gradient(aligned(x), grad, partial)
        sums = partial.sum(0).to(weight.dtype)
        grads[1:] = [sums[:-1].t().reshape(weight.shape), sums[-1]][:len(needs) - 1]
    return grads
