"""FSRA, frame-wise spatial aggregation: one learned query attends to a frame's window tokens (SPEC stage 7)."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..checks import Checks
from .has_backend import HasBackend
from .lsd import key_value_projection, query_projection
from .pooling import fold_query, project_values


class FSRA(HasBackend):
    """``f = c + Wp MHA(Wq LNq(c), Wkv LNkv(y)) + bp``, for one query ``c`` and each frame's windows ``y``.

    Args:
        dim: channels C.
        num_heads: must divide C; the scale is ``C ** -0.5``, of the full width.
        device, dtype: of the parameters.

    Attributes:
        backend: which implementation of the op to use, ``auto`` or a name of ``panda_kernels.backends.NAMES``.

    Source: SPEC stage 7; arXiv 2412.18609, section 3.
    """

    def __init__(self, dim: int = 1024, num_heads: int = 8, *, device: torch.device | str | None = None,
                 dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if dim % num_heads:
            Checks("FSRA").fail("num_heads", f"a divisor of dim = {dim}", num_heads)
        self.num_heads = num_heads
        self.q = query_projection(dim, device=device, dtype=dtype)
        self.kv = key_value_projection(dim, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)

    def _weights(self) -> tuple[Tensor, Tensor]:
        """Of keys and values. Taken twice, each would fill the other's half of the gradient with zeros."""
        kv: Any = self.kv
        return kv[1].weight.chunk(2)

    def fold(self, query: Tensor, wk: Tensor | None = None) -> Tensor:
        """The query, any shape of C elements, as it meets the un-affined tokens: ``[num_heads, C]``."""
        kv: Any = self.kv
        wk = self._weights()[0] if wk is None else wk
        return fold_query(self.q(query.flatten()), wk, kv[0], self.num_heads, query.numel()**-0.5)

    def forward(self, query: Tensor, y: Tensor, cu_windows: Tensor, *, folded: Tensor | None = None) -> Tensor:
        """Query of C elements, packed windows ``y [num_windows, C]`` -> ``f [frames, C]``.

        ``cu_windows`` int32 ``[frames + 1]`` are the frames' offsets in ``y``; ``folded`` is ``fold(query)`` if it is
        known already.

        Raises:
            ValueError: a wrong rank or C, no windows, or tensors on several devices.
            TypeError: dtypes that differ.
        """
        wk, wv = self._weights()
        u = self.fold(query, wk) if folded is None else folded
        kv: Any = self.kv
        z = ops.attention_pool(y, u, cu_seqlens=cu_windows, eps=kv[0].eps, backend=self.backend)
        return self.finish(query, z, wv)

    def value_weights(self) -> tuple[Tensor, ...]:
        """Of :meth:`finish`: the values' norm, weight and bias (zeros here), the output's weight and bias."""
        kv: Any = self.kv
        norm, wv = kv[0], self._weights()[1]
        return norm.weight, norm.bias, wv, torch.zeros_like(norm.bias), self.proj.weight, self.proj.bias

    def finish(self, query: Tensor, z: Tensor, wv: Tensor | None = None) -> Tensor:
        """What follows the pooling: ``z [frames, num_heads, C]`` -> ``f [frames, C]``."""
        kv: Any = self.kv
        wv = self._weights()[1] if wv is None else wv
        return query.flatten() + self.proj(project_values(z, wv, kv[0]))
