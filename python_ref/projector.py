"""Stage 10, projector: Linear, exact GELU, Linear on every token."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Projector(nn.Sequential):
    """``[..., dim] -> [..., out_dim]``; the children ``0`` and ``2`` carry the parameters, as in the checkpoints."""

    def __init__(self, dim: int = 1024, out_dim: int = 4096) -> None:
        super().__init__(nn.Linear(dim, out_dim), nn.GELU(), nn.Linear(out_dim, out_dim))


def token_mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """``[..., C]`` -> ``gelu(x w1^T + b1) w2^T + b2``, the exact (erf) GELU."""
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)
