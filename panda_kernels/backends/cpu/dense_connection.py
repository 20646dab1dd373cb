"""A sum of tokens in memory that earlier results have left."""
from __future__ import annotations

import torch
from torch import Tensor

from . import refusals  # noqa: F401
from ._arrays import result_like


def fwd(x: Tensor, y: Tensor) -> Tensor:
    return torch.add(x, y, out=result_like(x))
