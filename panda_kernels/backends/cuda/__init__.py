"""CUDA kernels (csrc/cuda) on NVIDIA GPUs from sm_80: float32, bfloat16 and float16 with float32 accumulation."""
from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._extension import PACKAGE, load
from .._outside import outside

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LIBRARY = PACKAGE / "_cuda.so"


@functools.cache
def load_error() -> str | None:
    """Loads the extension at the first call on a machine with a GPU; why it cannot be used, or None."""
    if not torch.version.cuda or not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU"
    return load(LIBRARY.name, "CUDA extension", "cuda_error")


def refusals(inputs: Sequence[Any]) -> list[str]:
    """Tensors elsewhere than on a GPU from sm_80, or of a dtype the kernels do not compute in."""
    if reasons := outside(inputs, "cuda", DTYPES):
        return reasons
    devices = {t.device for t in inputs if isinstance(t, Tensor)}
    return [f"{device} is older than sm_80" for device in devices if torch.cuda.get_device_capability(device) < (8, 0)]


def partial_vectors(t: Tensor) -> list[str]:
    """The reason that channels, the last dimension, do not fill vectors of 16 bytes, if so."""
    channels = t.shape[-1]
    return [f"{channels} channels, not a multiple of 16 bytes"] if channels * t.element_size() % 16 else []


def aligned(t: Tensor) -> Tensor:
    """Contiguous, from an address that is a multiple of 16."""
    t = t.contiguous()
    return t.clone() if t.data_ptr() % 16 else t
