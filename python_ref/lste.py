"""Stage 2, LSTE, local spatio-temporal encoding: a bottleneck over time, then a dynamic position encoding."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .patch import patch_embed


class LocalMHRA(nn.Module):
    """``W2 * tconv(W1 * BN(x) + b1) + b2`` on ``[B, C, T, h, w]``, with ``R = int(C / reduction)`` inner channels."""

    def __init__(self, dim: int, reduction: float = 1.5) -> None:
        super().__init__()
        reduced = int(dim / reduction)
        last = nn.Conv3d(reduced, dim, kernel_size=1)
        nn.init.zeros_(last.weight)
        _zero_bias(last)
        self.pos_embed = nn.Sequential(
            nn.BatchNorm3d(dim),
            nn.Conv3d(dim, reduced, kernel_size=1),
            nn.Conv3d(reduced, reduced, kernel_size=(3, 1, 1), padding=(1, 0, 0), groups=reduced),
            last,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.pos_embed(x)


def position_encoding(dim: int) -> nn.Conv3d:
    """The depthwise 3x3x3 convolution ``dw`` of ``x2 = x1 + dw(x1)``."""
    conv = nn.Conv3d(dim, dim, kernel_size=3, padding=1, groups=dim)
    _zero_bias(conv)
    return conv


def _zero_bias(conv: nn.Conv3d) -> None:
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)


def lste(x0: Tensor, mhra: LocalMHRA, dpe: nn.Conv3d) -> Tensor:
    """``[B, C, T, h, w]`` -> the same shape."""
    x1 = x0 + mhra(x0)
    return x1 + dpe(x1)


def depthwise_conv3d(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, residual: bool = False) -> Tensor:
    """``[B, T, h, w, C]`` with weight ``[C, 1, kt, kh, kw]`` (odd): "same" zero padding, optionally ``+ x``."""
    channels_first = x.permute(0, 4, 1, 2, 3)
    padding = tuple(k // 2 for k in weight.shape[2:])
    y = F.conv3d(channels_first, weight, bias, padding=padding, groups=weight.shape[0]).permute(0, 2, 3, 4, 1)
    return x + y if residual else y


def local_encoding(
    x: Tensor,
    norm_scale: Tensor,
    norm_shift: Tensor,
    w1: Tensor,
    b1: Tensor,
    wt: Tensor,
    bt: Tensor,
    w2: Tensor,
    b2: Tensor,
    wd: Tensor,
    bd: Tensor,
    *,
    pixels: Tensor | None = None,
    embedding: Tensor | None = None,
    present: Tensor | None = None,
) -> Tensor:
    """The whole stage on ``[B, T, h, w, C]``, BatchNorm given as ``x * norm_scale + norm_shift``.

    ``w1 [R, C]``, ``wt [R, 3]``, ``w2 [C, R]``, ``wd [C, 1, 3, 3, 3]``. With pixels and an embedding, W1 multiplies the
    patch embedding of those, whatever ``x`` is.
    """
    tokens = x if pixels is None or embedding is None else patch_embed(pixels, embedding, present=present)
    inner = F.linear((tokens * norm_scale + norm_shift).to(x.dtype), w1, b1)
    inner = depthwise_conv3d(inner, wt[:, None, :, None, None], bt)
    return depthwise_conv3d(x + F.linear(inner, w2, b2), wd, bd, residual=True)
