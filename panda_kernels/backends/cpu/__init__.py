"""The compiled core (csrc/) on the CPU: float32 and bfloat16 with float32 accumulation; float16 runs as float32."""
from __future__ import annotations

import functools
import platform
from collections.abc import Sequence
from typing import Any

import torch

from .._extension import build_info, load  # noqa: F401
from .._outside import outside

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def load_error() -> str | None:
    """Loads the extension at the first call; why it cannot be used, or None."""
    return load("_cpu.so", "compiled extension", "error")


def isa() -> str:
    """The SIMD tier in use, one of portable, avx2, avx512, avx512_bf16, amx; PANDA_KERNELS_ISA can lower it."""
    return f"{torch.ops.panda_kernels_cpu.isa()} on {platform.machine()}"


def refusals(inputs: Sequence[Any]) -> list[str]:
    """Tensors elsewhere than on the CPU, or of a dtype the kernels do not compute in."""
    return outside(inputs, "cpu", DTYPES)
