"""torch's own convolution, on the channels-last layout the tokens already have."""
from __future__ import annotations

import torch
from torch import Tensor

from . import refusals  # noqa: F401


def _padding(weight: Tensor) -> list[int]:
    return [k // 2 for k in weight.shape[2:]]


def fwd(x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool) -> Tensor:
    channels_first = x.movedim(-1, 1)
    y = torch.conv3d(channels_first, weight, bias, padding=_padding(weight), groups=x.shape[-1]).movedim(1, -1)
    return (y + x if residual else y).contiguous()


def bwd(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool, *,
        needs: list[bool]) -> list[Tensor | None]:
    channels = x.shape[-1]
    # torch 2.13's weight gradient in half precision on the CPU is wrong for channels-last grids of a few patches.
    dtype = torch.float32 if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) else x.dtype
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad.to(dtype).movedim(-1, 1), x.to(dtype).movedim(-1, 1), weight.to(dtype), [channels], [1, 1, 1],
        _padding(weight), [1, 1, 1], False, [0, 0, 0], channels, [needs[0], needs[1], bias is not None and needs[2]])
    if needs[0]:
        grad_x = grad_x.movedim(1, -1)
        grad_x = grad_x + grad if residual else grad_x
    return [None if g is None else g.to(x.dtype) for g in (grad_x, grad_weight, grad_bias)]
