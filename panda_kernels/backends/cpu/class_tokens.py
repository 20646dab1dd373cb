"""From what the two global poolings left to each frame's class token: a handful of rows through small products.

They are products of the core's, whose bits depend neither on the number of threads nor on the other rows.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._arrays import compute_dtype, floats, kernels, pack


class ValueWeights(NamedTuple):
    """Of an attention by one query ``[C]``: its values' norm and projection, its output's projection."""

    query: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    wv: Tensor
    bv: Tensor
    wp: Tensor
    bp: Tensor


class MLPWeights(NamedTuple):
    """Of GSTRA's MLP, behind its norm."""

    norm_weight: Tensor
    norm_bias: Tensor
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor


class FusionWeights(NamedTuple):
    """Of the fusion: the balance before its sigmoid, then norm and projection."""

    balance: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    w: Tensor
    b: Tensor


class _Linear(NamedTuple):
    packed: Tensor
    bias: Tensor
    dtype: torch.dtype

    def __call__(self, x: Tensor, *, quick_gelu: bool = False, residual: Tensor | None = None) -> Tensor:
        """``x [rows, k]``, or ``[rows, n, k]`` for a stack of n weights, to ``[rows, outputs of all]``."""
        x = x.to(self.dtype)
        x = x[:, None] if x.ndim == 2 else x
        y = torch.empty(*x.shape[:2], len(self.bias) // x.shape[1], dtype=self.dtype)
        kernels.linear(x.contiguous(), self.packed, self.bias, quick_gelu, residual, y)
        return y.flatten(1)


class ClassTokens(NamedTuple):
    clip_values: tuple[_Linear, _Linear]
    mlp: tuple[_Linear, _Linear]
    frame_values: tuple[_Linear, _Linear]
    share: Tensor
    fusion: _Linear
    eps: float


def prepare(clip: ValueWeights, mlp: MLPWeights, frame: ValueWeights, fusion: FusionWeights, *, clip_heads: int,
            frame_heads: int, eps: float) -> ClassTokens:
    """Fold the norms' affines into the products behind them, and pack those."""
    dtype = compute_dtype(fusion.w.dtype)
    return ClassTokens(
        _values(clip, dtype, clip_heads),
        (_behind_norm(*mlp[:4], dtype=dtype), _Linear(pack(mlp.w2, dtype), floats(mlp.b2), dtype)),
        _values(frame, dtype, frame_heads),
        torch.sigmoid(fusion.balance.float()),
        _behind_norm(*fusion[1:], dtype=dtype), eps)


def _behind_norm(norm_weight: Tensor, norm_bias: Tensor, w: Tensor, b: Tensor, *, dtype: torch.dtype,
                 heads: int = 1) -> _Linear:
    precise = w.double()
    bias = precise @ norm_bias.double() + b.double()
    return _Linear(pack((precise * norm_weight.double()).unflatten(0, (heads, -1)), dtype), floats(bias), dtype)


def _values(w: ValueWeights, dtype: torch.dtype, heads: int) -> tuple[_Linear, _Linear]:
    """To the pooled tokens of each head, and from them all to the query's update, the query in the bias."""
    out = _Linear(pack(w.wp, dtype), (w.query.double().flatten() + w.bp.double()).float(), dtype)
    return _behind_norm(w.norm_weight, w.norm_bias, w.wv, w.bv, dtype=dtype, heads=heads), out


def run(weights: ClassTokens, clip_pooled: Tensor, frame_pooled: Tensor) -> Tensor:
    """``[B, n, C]`` of the clips (empty for images) and ``[B * T, n, C]`` of the frames -> ``[B * T, C]``."""
    f = _through(weights.frame_values, frame_pooled)
    if not len(clip_pooled):
        return f
    g = _through(weights.clip_values, clip_pooled)
    first, second = weights.mlp
    g = second(first(_normalised(g, weights.eps), quick_gelu=True), residual=g)
    frames = f.unflatten(0, (len(g), -1)).float()
    fused = (1 - weights.share) * g.float()[:, None] + weights.share * frames
    return weights.fusion(_normalised(fused.flatten(0, 1), weights.eps))


def _through(layers: tuple[_Linear, _Linear], pooled: Tensor) -> Tensor:
    first, second = layers
    return second(first(pooled))


def _normalised(x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[1:], eps=eps)
