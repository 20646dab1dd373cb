"""From what the two global poolings left to each frame's class token: a handful of rows through small products.

They are the core's own, whose bits depend neither on the number of threads nor on the other rows; torch's products
and its sigmoid do.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._arrays import array, floats, kernels


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
    """A stack of weights ``[m, n, k]`` as they lie in the module, and their bias ``[m * n]``."""

    w: Tensor
    bias: Tensor

    def __call__(self, x: Tensor, *, quick_gelu: bool = False) -> Tensor:
        """float32 ``x [rows, m, k]``, or ``[rows, k]`` for one matrix, to ``[rows, m * n]``."""
        y = torch.empty(len(x), *self.w.shape[:2])
        kernels.linear(x.view(len(x), len(self.w), -1), self.w, self.bias, quick_gelu, y)
        return y.flatten(1)


class _Affine(NamedTuple):
    """Of a norm."""

    weight: Tensor
    bias: Tensor


class _Values(NamedTuple):
    norm: _Affine
    heads: _Linear
    out: _Linear


class ClassTokens(NamedTuple):
    clip_values: _Values
    mlp_norm: _Affine
    mlp: tuple[_Linear, _Linear]
    frame_values: _Values
    share: Tensor
    fusion_norm: _Affine
    fusion: _Linear
    eps: float


def prepare(clip: ValueWeights, mlp: MLPWeights, frame: ValueWeights, fusion: FusionWeights, *, clip_heads: int,
            frame_heads: int, eps: float) -> ClassTokens:
    """Matrices by reference, where the backend computes in their dtype, and vectors in float32."""
    return ClassTokens(_values(clip, clip_heads), _Affine(floats(mlp.norm_weight), floats(mlp.norm_bias)),
                       (_linear(mlp.w1, mlp.b1), _linear(mlp.w2, mlp.b2)), _values(frame, frame_heads),
                       torch.sigmoid(floats(fusion.balance)),
                       _Affine(floats(fusion.norm_weight), floats(fusion.norm_bias)), _linear(fusion.w, fusion.b), eps)


def _linear(w: Tensor, b: Tensor) -> _Linear:
    return _Linear(array(w if w.ndim == 3 else w[None]), floats(b))


def _values(w: ValueWeights, heads: int) -> _Values:
    """To the pooled tokens of each head, and from them all to the query's update, the query in the bias."""
    query = w.query.flatten().float() + w.bp.float()
    return _Values(_Affine(floats(w.norm_weight), floats(w.norm_bias)),
                   _linear(w.wv.unflatten(0, (heads, -1)), w.bv), _linear(w.wp, query))


def run(weights: ClassTokens, clip_pooled: Tensor, frame_pooled: Tensor) -> Tensor:
    """float32 ``[B, n, C]`` of the clips (empty for images), ``[B * T, n, C]`` of the frames -> ``[B * T, C]``."""
    f = _attended(weights.frame_values, frame_pooled)
    if not len(clip_pooled):
        return f
    g = _attended(weights.clip_values, clip_pooled)
    first, second = weights.mlp
    normalised = F.layer_norm(g, g.shape[1:], *weights.mlp_norm, weights.eps)
    g = g + second(first(normalised, quick_gelu=True))
    fused = (1 - weights.share) * g[:, None] + weights.share * f.unflatten(0, (len(g), -1))
    return weights.fusion(F.layer_norm(fused.flatten(0, 1), f.shape[1:], *weights.fusion_norm, weights.eps))


def _attended(weights: _Values, pooled: Tensor) -> Tensor:
    norm, heads, out = weights
    return out(heads(pooled * norm.weight + norm.bias))
