"""torch's own convolution, on the channels-last layout the tokens already have."""
from __future__ import annotations

import torch
from torch import Tensor

from . import refusals  # noqa: F401
from ._arithmetic import as_float32, total


def _padding(weight: Tensor) -> list[int]:
    return [k // 2 for k in weight.shape[2:]]


def fwd(x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool) -> Tensor:
    dtype = torch.float32 if as_float32(x) else x.dtype
    y = torch.conv3d(x.to(dtype).movedim(-1, 1), weight.to(dtype), None if bias is None else bias.to(dtype),
                     padding=_padding(weight), groups=x.shape[-1]).movedim(1, -1).to(x.dtype)
    return (y + x if residual else y).contiguous()


def _precise(x: Tensor, weight: Tensor) -> bool:
    """Whether to leave half precision: oneDNN's bfloat16 weight gradient is wrong on grids smaller than the kernel.

    Seen in torch 2.13 (oneDNN 3.12), where the taps that never meet the grid come back uninitialised.
    """
    smaller = any(n < k for n, k in zip(x.shape[1:4], weight.shape[2:], strict=True))
    return smaller and x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)


def bwd(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool, *,
        needs: list[bool]) -> list[Tensor | None]:
    channels = x.shape[-1]
    dtype = torch.float32 if as_float32(x) or _precise(x, weight) else x.dtype
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad.to(dtype).movedim(-1, 1), x.to(dtype).movedim(-1, 1), weight.to(dtype), None, [1, 1, 1],
        _padding(weight), [1, 1, 1], False, [0, 0, 0], channels, [needs[0], needs[1], False])
    grad_bias = total(grad) if bias is not None and needs[2] else None
    if needs[0]:
        grad_x = grad_x.movedim(1, -1)
        grad_x = grad_x + grad if residual else grad_x
    return [None if g is None else g.to(x.dtype) for g in (grad_x, grad_weight, grad_bias)]
