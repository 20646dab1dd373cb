"""Every op in plain torch, through the identities of cheaper arithmetic; any device, any float dtype."""
from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch


def load_error() -> str | None:
    return None


def refusals(inputs: Sequence[Any]) -> list[str]:
    return []


@functools.cache
def has_products(dtype: torch.dtype) -> bool:
    """Whether torch multiplies matrices of ``dtype`` on this CPU at the speed of its instructions.

    Without AVX-512 its bfloat16 products run at 1 GFLOP/s, where float32 reaches a hundred; float16 ones even with it,
    until AVX-512 FP16.
    """
    supported = {torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
                 torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported}
    return dtype not in supported or supported[dtype]()
