"""Stage 8, fusion: the clip's token and the frame's token, weighed by a learned balance and projected."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def fusion_projection(dim: int, dropout: float = 0.5) -> nn.Sequential:
    """LayerNorm, dropout, Linear."""
    return nn.Sequential(nn.LayerNorm(dim), nn.Dropout(dropout), nn.Linear(dim, dim))


def fuse(g: Tensor, f: Tensor, balance: Tensor, proj: nn.Sequential) -> Tensor:
    """Global and frame tokens ``g, f [..., C]`` -> ``proj((1 - a) * g + a * f)`` with ``a = sigmoid(balance)``."""
    a = torch.sigmoid(balance)
    return proj((1 - a) * g + a * f)
