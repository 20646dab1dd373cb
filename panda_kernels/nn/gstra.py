"""GSTRA, global spatio-temporal aggregation: one learned query attends to all tokens of a clip (SPEC stage 3)."""
from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..checks import Checks
from .few_rows import FewRows
from .has_backend import HasBackend
from .pooling import fold_query, project_values


class QuickGELU(nn.Module):
    """``x * sigmoid(1.702 x)``."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class GSTRA(HasBackend):
    """``g = e + Wo MHA(LN1(e), LN3(x), LN3(x)) + bo``, then ``g + MLP(LN2(g))``, for one query ``e`` a clip.

    Args:
        dim: channels C.
        num_heads: must divide C; scale is ``(C / num_heads) ** -0.5``.
        dropout: rate inside the MLP; none in the attention.
        device, dtype: of the parameters.

    Attributes:
        backend: which implementation of the op to use, ``auto`` or a name of ``panda_kernels.backends.NAMES``.
            Setting it sets it for the MLP's layers as well.

    The attention's output projection and the MLP's last layer are zero at first, as released.
    Source: SPEC stage 3; arXiv 2412.18609, section 3.
    """

    def __init__(self, dim: int = 1024, num_heads: int = 8, *, dropout: float = 0.5,
                 device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if dim % num_heads:
            Checks("GSTRA").fail("num_heads", f"a divisor of dim = {dim}", num_heads)
        self.attn = nn.MultiheadAttention(dim, num_heads, device=device, dtype=dtype)
        self.ln_1 = nn.LayerNorm(dim, device=device, dtype=dtype)
        c_proj = FewRows(4 * dim, dim, device=device, dtype=dtype)
        self.mlp = nn.Sequential(OrderedDict(
            c_fc=FewRows(dim, 4 * dim, device=device, dtype=dtype),
            gelu=QuickGELU(),
            dropout=nn.Dropout(dropout),
            c_proj=c_proj,
        ))
        self.ln_2 = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.ln_3 = nn.LayerNorm(dim, device=device, dtype=dtype)
        for layer in (self.attn.out_proj, c_proj):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def _weights(self) -> tuple[Tensor, ...]:
        """Of queries, keys and values. Taken twice, each would fill the others' part of the gradient with zeros."""
        return self.attn.in_proj_weight.chunk(3)

    def fold(self, query: Tensor, weights: tuple[Tensor, ...] | None = None) -> Tensor:
        """The query, any shape of C elements, as it meets the un-affined tokens: ``[num_heads, C]``."""
        wq, wk, _ = self._weights() if weights is None else weights
        bq = self.attn.in_proj_bias.chunk(3)[0]
        q = F.linear(self.ln_1(query.flatten()), wq, bq)
        return fold_query(q, wk, self.ln_3, self.attn.num_heads, self.attn.head_dim**-0.5)

    def forward(self, query: Tensor, x: Tensor, *, folded: Tensor | None = None) -> Tensor:
        """Query of C elements and tokens ``[B, N, C]`` of the parameters' dtype -> ``g [B, C]``.

        ``folded`` is ``fold(query)`` if it is known already.

        Raises:
            ValueError: a wrong rank or C, an empty batch, or tensors on several devices.
            TypeError: dtypes that differ.
        """
        weights = self._weights()
        u = self.fold(query, weights) if folded is None else folded
        z = ops.attention_pool(x, u, eps=self.ln_3.eps, backend=self.backend)
        return self.finish(query, z, weights[2])

    def value_weights(self) -> tuple[Tensor, ...]:
        """Of :meth:`finish`: the values' norm, weight and bias, the output's weight and bias."""
        wv, bv = self._weights()[2], self.attn.in_proj_bias.chunk(3)[2]
        out = self.attn.out_proj
        return self.ln_3.weight, self.ln_3.bias, wv, bv, out.weight, out.bias

    def mlp_weights(self) -> tuple[Tensor, ...]:
        """Of :meth:`finish`: the MLP's norm and its two layers."""
        first: Any = self.mlp.c_fc
        last: Any = self.mlp.c_proj
        return self.ln_2.weight, self.ln_2.bias, first.weight, first.bias, last.weight, last.bias

    def finish(self, query: Tensor, z: Tensor, wv: Tensor | None = None) -> Tensor:
        """What follows the pooling: ``z [B, num_heads, C]`` -> ``g [B, C]``."""
        wv, bv = self._weights()[2] if wv is None else wv, self.attn.in_proj_bias.chunk(3)[2]
        g = query.flatten() + self.attn.out_proj(project_values(z, wv, self.ln_3) + bv)
        return g + self.mlp(self.ln_2(g))
