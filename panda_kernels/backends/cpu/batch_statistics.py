"""Blocks of tokens on all threads, then the blocks' moments combined in order (csrc/core/batch_statistics.cpp)."""
from __future__ import annotations

import torch
from torch import Tensor

from ..torch.batch_statistics import slope_and_offset
from . import refusals  # noqa: F401
from ._arrays import array, kernels, result_like


def fwd(x: Tensor) -> Tensor:
    return _statistics(_rows(x))


def bwd(grad: Tensor, x: Tensor, *, needs: list[bool]) -> list[Tensor | None]:
    tokens = _rows(x)
    slope, offset = slope_and_offset(grad, _statistics(tokens)[0], len(tokens))
    grad_x = result_like(tokens)
    kernels.affine(tokens, slope, offset, grad_x)
    return [grad_x.view(x.shape).to(x.dtype)]


def _rows(x: Tensor) -> Tensor:
    return array(x).view(-1, x.shape[-1])


def _statistics(tokens: Tensor) -> Tensor:
    moments = torch.empty(2, tokens.shape[1])
    kernels.batch_statistics(tokens, moments)
    return moments
