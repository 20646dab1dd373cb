"""Autocast for the ops, as torch's own linear and convolution take part in it."""
from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def is_autocasting(x: Tensor) -> bool:
    """Whether autocast is on for the device of ``x``."""
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def cast(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """The tensors in autocast's dtype where it is on for the device of ``x``; float64 and integers stay."""
    if not is_autocasting(x):
        return (x, *others)
    dtype = torch.get_autocast_dtype(x.device.type)
    eligible = (torch.float32, torch.float16, torch.bfloat16)
    return tuple(t.to(dtype) if t is not None and t.dtype in eligible else t for t in (x, *others))


def suspended(x: Tensor) -> AbstractContextManager[object]:
    """Inside a backend: what it computes in float32 on purpose stays in float32."""
    return torch.autocast(x.device.type, enabled=False) if is_autocasting(x) else nullcontext()
