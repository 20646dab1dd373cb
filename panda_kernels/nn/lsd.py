"""LSD, local spatial downsampling: the mean of a window attends to the window's tokens (SPEC stage 6)."""
from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..checks import Checks
from ..ops.window_attention_pool import of_sum
from ..rectangles import Rectangles
from .has_backend import HasBackend


def query_projection(dim: int, **factory: Any) -> nn.Sequential:
    """``q.0`` and ``q.1``: LayerNorm, then a Linear without bias."""
    return nn.Sequential(nn.LayerNorm(dim, **factory), nn.Linear(dim, dim, bias=False, **factory))


def key_value_projection(dim: int, **factory: Any) -> nn.Sequential:
    """``kv.0`` and ``kv.1``: LayerNorm, then a Linear without bias whose first C rows are keys, the rest values."""
    return nn.Sequential(nn.LayerNorm(dim, **factory), nn.Linear(dim, 2 * dim, bias=False, **factory))


class LSD(HasBackend):
    """Per window, with ``r`` the mean of its tokens: ``y = r + Wp MHA(Wq LNq(r), Wkv LNkv(tokens)) + bp``.

    Args:
        dim: channels C.
        num_heads: must divide C; the scale is ``C ** -0.5``, of the full width.
        window: side of a window in patches; rows and columns that fill none are dropped.
        device, dtype: of the parameters.

    Attributes:
        backend: which implementation of the op to use, ``auto`` or a name of ``panda_kernels.backends.NAMES``.

    Source: SPEC stage 6; arXiv 2412.18609, section 3.
    """

    def __init__(self, dim: int = 1024, num_heads: int = 8, *, window: int = 2,
                 device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if dim % num_heads:
            Checks("LSD").fail("num_heads", f"a divisor of dim = {dim}", num_heads)
        self.num_heads, self.window = num_heads, window
        self.q = query_projection(dim, device=device, dtype=dtype)
        self.kv = key_value_projection(dim, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor, rectangles: Rectangles, *, added: Tensor | None = None) -> Tensor:
        """Tokens ``[frames, h, w, C]`` of the parameters' dtype -> windows of all frames, packed ``[num_windows, C]``.

        With ``added``, as ``x``, the tokens are the sum, whose gradient ``x`` receives and ``added`` does not.

        Raises:
            ValueError: a wrong rank, C or number of rectangles, an empty batch, or tensors on several devices.
            TypeError: dtypes that differ.
        """
        call: Any = ops.window_attention_pool if added is None else functools.partial(of_sum, added)
        return call(x, rectangles.corners, rectangles.num_windows, *self.weights(), num_heads=self.num_heads,
                    window=self.window, eps=self.eps, backend=self.backend)

    @property
    def eps(self) -> float:
        projection: Any = self.kv
        return projection[0].eps

    def weights(self) -> tuple[Tensor, ...]:
        """The tensors of ``window_attention_pool``, from ``q_norm_weight`` to ``bp``."""
        projections: Any = self.q, self.kv
        (q_norm, wq), (kv_norm, wkv) = projections
        return (q_norm.weight, q_norm.bias, wq.weight, kv_norm.weight, kv_norm.bias, wkv.weight, self.proj.weight,
                self.proj.bias)
