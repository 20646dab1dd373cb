"""Triton kernels (panda_kernels/triton) on a GPU: float32, bfloat16 and float16 with float32 accumulation."""
from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch

from .._outside import outside

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def load_error() -> str | None:
    """Why there is nothing to run kernels with, or None; does not import Triton where there is no GPU."""
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if find_spec("triton") is None:
        return "triton is not installed"
    return None


def refusals(inputs: Sequence[Any]) -> list[str]:
    """Tensors elsewhere than on a GPU, or of a dtype the kernels do not compute in."""
    return outside(inputs, "cuda", DTYPES)
