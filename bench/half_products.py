"""bfloat16 and float16 arithmetic of torch at float32's speed, on CPUs whose torch has no products in them.

Without AVX-512 torch multiplies bfloat16 matrices a hundred times more slowly than float32 ones. What such a product
computes, exact products summed in float32 and rounded once, is as well computed by converting its operands.
"""
from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from panda_kernels.backends.torch import has_products

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm, _aten.convolution, _aten.convolution_backward}


class ConvertedProducts(TorchDispatchMode):
    """Products of ``dtype`` are computed in float32 and rounded, forward and backward."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket not in _PRODUCTS or not any(self._is_half(a) for a in args):
            return func(*args, **(kwargs or {}))
        wide = tree_map(lambda a: a.float() if self._is_half(a) else a, (args, kwargs or {}))
        result = func(*wide[0], **wide[1])
        return tree_map(lambda r: r.to(self.dtype) if isinstance(r, Tensor) else r, result)

    def _is_half(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.dtype == self.dtype


def peer_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """In which torch's own code serves a row of ``dtype``: nobody runs a model in products that are not there."""
    return dtype if device != "cpu" or has_products(dtype) else torch.float32


def peer_name(name: str, dtype: torch.dtype, device: str) -> str:
    """``name``, with the dtype if that is not the row's."""
    used = peer_dtype(dtype, device)
    return name if used == dtype else f"{name} ({str(used).removeprefix('torch.')})"


def yardstick(dtype: torch.dtype, device: str) -> AbstractContextManager[Any]:
    """In which the reference's error is found: its products are those of a device that has them.

    Not for inference mode, which shows a dispatch mode whole layers instead of products.
    """
    return products_in(dtype) if device == "cpu" else nullcontext()


def products_in(dtype: torch.dtype) -> AbstractContextManager[Any]:
    """:class:`ConvertedProducts` where this machine's CPU needs it, else nothing; for towers on the CPU."""
    return nullcontext() if has_products(dtype) else ConvertedProducts(dtype)
