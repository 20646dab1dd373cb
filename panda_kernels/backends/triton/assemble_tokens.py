"""The gather of panda_kernels/triton/assemble_tokens.py, and its gradient."""
from __future__ import annotations

from torch import Tensor

from ...triton.assemble_tokens import assemble, gradients
from . import refusals  # noqa: F401


def fwd(y: Tensor, f: Tensor, split: Tensor, corners: Tensor, num_tokens: int, window: int) -> Tensor:
    return assemble(y.contiguous(), f.contiguous(), split.contiguous(), corners.contiguous(), num_tokens, window)


def bwd(grad: Tensor, y: Tensor, f: Tensor, split: Tensor, corners: Tensor, num_tokens: int, window: int, *,
        needs: list[bool]) -> list[Tensor | None]:
    grad_y, grad_f, grad_split = gradients(grad.contiguous(), y.shape[0], corners.contiguous(), window, needs[:3])
    return [grad_y, grad_f, None if grad_split is None else grad_split.to(split.dtype), None]
