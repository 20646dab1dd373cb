"""Rows staged once, 3x3x3 windows in registers (csrc/core/depthwise_body.inc)."""
from __future__ import annotations

import torch
from torch import Tensor

from . import refusals  # noqa: F401
from ._arrays import array, floats, kernels, tap_rows


def fwd(x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool) -> Tensor:
    tokens = array(x)
    y = torch.empty_like(tokens)
    kernels.depthwise_conv3d(tokens, tap_rows(weight, residual=residual), None if bias is None else floats(bias),
                             *weight.shape[2:], y)
    return y.to(x.dtype)
