"""What a backend for one kind of device and a few dtypes cannot serve."""
from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor


def outside(inputs: Sequence[Any], device: str, dtypes: Collection[torch.dtype]) -> list[str]:
    """Reasons: tensors elsewhere than on ``device`` (a type), and floating dtypes that are not among ``dtypes``."""
    tensors = [t for t in inputs if isinstance(t, Tensor)]
    reasons = [f"tensors on {d}" for d in sorted({str(t.device) for t in tensors if t.device.type != device})]
    floating = {t.dtype for t in tensors if t.dtype.is_floating_point}
    return reasons + [f"dtype {d}" for d in sorted(floating - set(dtypes), key=str)]
