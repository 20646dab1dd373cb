"""The dense connection ``x3 = x2 + x0``, and what becomes of its gradient."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, module: Any, x2: Tensor, x0: Tensor) -> tuple[Tensor, Tensor]:
        ctx.module = module
        return x2.view_as(x2), module.fwd(x2, x0)

    @staticmethod
    def backward(ctx: Any, g2: Tensor, g3: Tensor) -> tuple[Tensor | None, ...]:
        return None, ctx.module.fwd(g2, g3), torch.empty(0, dtype=g3.dtype).set_(g3)


def dense(x2, x0, backend):
    module = backends.first("dense_connection", "fwd", backend, (x2, x0))
    return _Dense.apply(module, x2, x0)
