"""What each op of the library computes: same names and arguments, in differentiable torch code of any float dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .assembly import assemble_tokens
from .lsd import window_attention_pool
from .lste import depthwise_conv3d, local_encoding
from .patch import patch_embed
from .projector import token_mlp

__all__ = [
    "assemble_tokens",
    "attention_pool",
    "batch_statistics",
    "depthwise_conv3d",
    "local_encoding",
    "patch_embed",
    "token_mlp",
    "window_attention_pool",
]


def attention_pool(x: Tensor, queries: Tensor, *, cu_seqlens: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """``z_n = sum_N softmax_N(queries_n . xhat) xhat``, ``xhat`` the un-affined LayerNorm of each token.

    ``x [B, N, C]`` and ``queries [n, C]`` or ``[B, n, C]`` -> ``[B, n, C]``. With ``cu_seqlens [S + 1]``, x is packed,
    ``[total, C]``, and the result ``[S, n, C]``; an empty segment pools to zero.
    """
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        shared = queries.expand(len(bounds) - 1, -1, -1)
        segments = zip(bounds[:-1], bounds[1:], shared, strict=True)
        return torch.cat([attention_pool(x[None, i:j], q, eps=eps) for i, j, q in segments])
    normalised = F.layer_norm(x, x.shape[-1:], eps=eps)
    weights = torch.softmax(queries @ normalised.transpose(-2, -1), dim=-1)
    return weights @ normalised


def batch_statistics(x: Tensor) -> Tensor:
    """Mean and biased variance of each channel of ``x [..., C]``, ``[2, C]``, at least float32 as in torch's norms."""
    tokens = x.flatten(0, -2).to(torch.promote_types(x.dtype, torch.float32))
    var, mean = torch.var_mean(tokens, 0, correction=0)
    return torch.stack([mean, var])
