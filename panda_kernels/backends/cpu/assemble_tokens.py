"""Whole rows copied to their place, and back."""
from __future__ import annotations

import torch
from torch import Tensor

from . import refusals  # noqa: F401
from ._arrays import array, kernels, result


def fwd(y: Tensor, f: Tensor, split: Tensor, corners: Tensor, num_tokens: int, window: int) -> Tensor:
    windows = array(y)
    tokens = result(num_tokens, y.shape[1], dtype=windows.dtype)
    kernels.assemble_tokens(windows, array(f), array(split), corners.contiguous(), window, tokens)
    return tokens.to(y.dtype)


def bwd(grad: Tensor, y: Tensor, f: Tensor, split: Tensor, corners: Tensor, num_tokens: int, window: int, *,
        needs: list[bool]) -> list[Tensor | None]:
    tokens = array(grad)
    grads = [result(*t.shape, dtype=tokens.dtype) for t in (y, f)] + [torch.empty(*split.shape)]
    kernels.assemble_tokens_gradient(tokens, corners.contiguous(), window, *grads)
    return [g.to(y.dtype) for g in grads]
