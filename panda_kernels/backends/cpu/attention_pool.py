"""One pass over the tokens, partial softmaxes merged in a fixed order (csrc/core/pooling_body.inc)."""
from __future__ import annotations

import torch
from torch import Tensor

from . import refusals  # noqa: F401
from ._arrays import array, floats, kernels


def fwd(x: Tensor, queries: Tensor, cu_seqlens: Tensor | None, eps: float) -> Tensor:
    offsets = torch.arange(x.shape[0] + 1) * x.shape[1] if cu_seqlens is None else cu_seqlens.long().contiguous()
    z = torch.empty(len(offsets) - 1, queries.shape[-2], x.shape[-1])
    kernels.attention_pool(array(x), floats(queries), offsets, eps, z)
    return z.to(x.dtype)
