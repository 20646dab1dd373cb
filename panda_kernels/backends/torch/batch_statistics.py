"""torch's own reduction, in the wide dtype."""
from __future__ import annotations

import torch
from torch import Tensor

from . import refusals  # noqa: F401
from ._arithmetic import rows, wide


def fwd(x: Tensor) -> Tensor:
    var, mean = torch.var_mean(rows(x).to(wide(x)), 0, correction=0)
    return torch.stack([mean, var])


def slope_and_offset(grad: Tensor, mean: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """The gradient of ``x`` is ``x * slope + offset``, both ``[C]``."""
    grad_mean, grad_var = grad.unbind()
    slope = 2 / tokens * grad_var
    return slope, grad_mean / tokens - slope * mean


def bwd(grad: Tensor, x: Tensor, *, needs: list[bool]) -> list[Tensor | None]:
    slope, offset = slope_and_offset(grad, fwd(x)[0], x.numel() // x.shape[-1])
    return [torch.addcmul(offset, x.to(wide(x)), slope).to(x.dtype)]
