"""Stage 6, LSD, local spatial downsampling: the mean of a window attends to the window's tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def pool_windows(
    x: Tensor,
    q_norm_weight: Tensor,
    q_norm_bias: Tensor,
    wq: Tensor,
    kv_norm_weight: Tensor,
    kv_norm_bias: Tensor,
    wkv: Tensor,
    wp: Tensor,
    bp: Tensor,
    *,
    num_heads: int = 8,
    window: int = 2,
    eps: float = 1e-5,
    scale: float | None = None,
) -> Tensor:
    """One frame's rectangle ``[rows, cols, C]`` -> one token a window ``[h', w', C]``.

    Rows and columns that do not fill a window are dropped. ``wkv [2C, C]`` stacks keys over values. ``scale`` is
    ``C**-0.5`` unless given.
    """
    dim = x.shape[-1]
    h, w = x.shape[0] // window, x.shape[1] // window
    tokens = x[: h * window, : w * window].reshape(h, window, w, window, dim).transpose(1, 2)
    tokens = tokens.reshape(h * w, window * window, dim)
    mean = tokens.mean(1, keepdim=True)

    q = F.linear(F.layer_norm(mean, (dim,), q_norm_weight, q_norm_bias, eps), wq)
    kv = F.linear(F.layer_norm(tokens, (dim,), kv_norm_weight, kv_norm_bias, eps), wkv)
    q = q.unflatten(-1, (num_heads, -1)).transpose(1, 2)
    k, v = kv.unflatten(-1, (2, num_heads, -1)).permute(2, 0, 3, 1, 4)
    weights = torch.softmax(q @ k.transpose(-2, -1) * (dim**-0.5 if scale is None else scale), dim=-1)
    attended = (weights @ v).transpose(1, 2).flatten(2)
    return (mean + F.linear(attended, wp, bp)).view(h, w, dim)


def window_attention_pool(
    x: Tensor,
    corners: Tensor,
    num_windows: int,
    q_norm_weight: Tensor,
    q_norm_bias: Tensor,
    wq: Tensor,
    kv_norm_weight: Tensor,
    kv_norm_bias: Tensor,
    wkv: Tensor,
    wp: Tensor,
    bp: Tensor,
    *,
    num_heads: int = 8,
    window: int = 2,
    eps: float = 1e-5,
    scale: float | None = None,
) -> Tensor:
    """``[frames, h, w, C]`` and corners ``[frames, 4]`` -> the windows of all frames, packed, ``[num_windows, C]``.

    Raises ValueError if the corners hold another number of windows.
    """
    weights = (q_norm_weight, q_norm_bias, wq, kv_norm_weight, kv_norm_bias, wkv, wp, bp)
    pooled = [
        pool_windows(frame[r0:r1, c0:c1], *weights, num_heads=num_heads, window=window, eps=eps, scale=scale)
        for frame, (r0, r1, c0, c1) in zip(x, corners.tolist(), strict=True)
    ]
    y = torch.cat([frame.flatten(0, 1) for frame in pooled])
    if len(y) != num_windows:
        raise ValueError(f"window_attention_pool: the corners hold {len(y)} windows, num_windows says {num_windows}")
    return y


class LSD(nn.Module):
    """A rectangle ``[rows, cols, C]`` -> ``[h', w', C]``; the softmax's scale is that of the full width."""

    def __init__(self, dim: int, num_heads: int = 8, window: int = 2) -> None:
        super().__init__()
        self.num_heads, self.window = num_heads, window
        self.q = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim, bias=False))
        self.kv = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim, bias=False))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        weights = (*self.q.parameters(), *self.kv.parameters(), *self.proj.parameters())
        return pool_windows(x, *weights, num_heads=self.num_heads, window=self.window)
