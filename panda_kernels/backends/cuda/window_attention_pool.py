"""LSD forward with the attention of csrc/cuda/window_attention_pool.cu; the rest, and gradients, are Triton's."""
from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import cuda, triton
from ..triton import window_attention_pool as by_triton
from . import aligned


def refusals(inputs: Sequence[Any]) -> list[str]:
    if error := triton.load_error():
        return [f"triton: {error}"]
    x, num_heads, window = inputs[0], inputs[11], inputs[12]
    return cuda.refusals(inputs) + unserved(x.dtype, x.shape[-1], num_heads, window)


def unserved(dtype: torch.dtype, C: int, num_heads: int, window: int) -> list[str]:
    """What the kernel was not written for."""
    reasons = [f"dtype {dtype}"] if dtype not in (torch.bfloat16, torch.float16) else []
    if window != 2:
        reasons.append(f"windows of {window}, not 2")
    width = C // num_heads
    if C % 32 or num_heads % 2 or width % 16 or width > 176:
        reasons.append(f"{num_heads} heads of {width} columns, not an even number of at most 176, a multiple of 16")
    return reasons


def head_outputs(x: Tensor, found: Any, q: Tensor, norm_weight: Tensor, norm_bias: Tensor, wkv: Tensor, num_heads: int,
                 window: int, scale: float) -> Tensor:
    """The heads' outputs ``[W, C]``, before ``wp``; arguments as of Triton's function of that name."""
    result = torch.empty_like(q)
    torch.ops.panda_kernels_cuda.attend(aligned(x), found.places, found.norms, q, aligned(norm_weight),
                                        aligned(norm_bias), aligned(wkv), num_heads, scale, result)
    return result


fwd = partial(by_triton.forward, head_outputs)
