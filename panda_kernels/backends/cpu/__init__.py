"""The compiled core (csrc/) on the CPU: float32 and bfloat16 with float32 accumulation; float16 runs as float32."""
from __future__ import annotations

import functools
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .._outside import outside

_PACKAGE = Path(__file__).parents[2]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def load_error() -> str | None:
    """Loads the extension at the first call; why it cannot be used, or None."""
    library = _PACKAGE / "_cpu.so"
    if not library.exists():
        return f"the compiled extension is missing: {build_info().get('error', 'it was never built')}"
    try:
        torch.ops.load_library(library)
    except (OSError, RuntimeError) as error:
        return f"the compiled extension does not load under torch {torch.__version__}: {error}"
    return None


def build_info() -> dict[str, str]:
    """What the build left behind: the compiler and torch it used, or under ``error`` why there is no extension."""
    file = _PACKAGE / "_build.json"
    return json.loads(file.read_text()) if file.exists() else {}


def isa() -> str:
    """The SIMD tier in use, one of portable, avx2, avx512, avx512_bf16, amx; PANDA_KERNELS_ISA can lower it."""
    return f"{torch.ops.panda_kernels_cpu.isa()} on {platform.machine()}"


def refusals(inputs: Sequence[Any]) -> list[str]:
    """Tensors elsewhere than on the CPU, or of a dtype the kernels do not compute in."""
    return outside(inputs, "cpu", DTYPES)
