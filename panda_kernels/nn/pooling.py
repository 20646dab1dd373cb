"""The two identities that let a fixed query pool tokens without projecting them.

For a query known before the tokens are seen, ``q_h . (Wk_h LN(x) + bk_h)`` is ``u_h . xhat`` up to a constant that the
softmax ignores, with ``u_h = scale * gamma * (Wk_h^T q_h)`` and ``xhat`` the un-affined LayerNorm of ``x``. And because
the softmax's weights sum to one, values can be projected after pooling. Source: SPEC, "The same function, cheaper".
"""
from __future__ import annotations

import torch
from torch import Tensor, nn


def fold_query(q: Tensor, wk: Tensor, norm: nn.LayerNorm, num_heads: int, scale: float) -> Tensor:
    """Projected query ``[C]`` and key weight ``[C, C]`` -> ``u [num_heads, C]``, to be met with ``xhat``."""
    keys = wk.unflatten(0, (num_heads, -1))
    return torch.einsum("nd,ndc->nc", q.unflatten(0, (num_heads, -1)), keys) * norm.weight * scale


def project_values(z: Tensor, wv: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Pooled ``z [S, n, C]`` and value weight ``[C, C]`` -> ``Wv_h (gamma * z_h + beta)`` of all heads, ``[S, C]``."""
    values = wv.unflatten(0, (z.shape[1], -1))
    return torch.einsum("snc,ndc->snd", z * norm.weight + norm.bias, values).flatten(1)
