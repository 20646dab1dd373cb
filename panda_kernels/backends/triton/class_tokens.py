"""From what the two global poolings left to each frame's class token: five launches of panda_kernels/triton, two for
images. Everything between them is float32; weights stay as they lie in the modules."""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...triton.class_tokens import Linear, apply, apply_both


class ClassTokens(NamedTuple):
    clip_values: Linear
    clip_out: Linear
    mlp: tuple[Linear, Linear]
    frame_values: Linear
    frame_out: Linear
    fusion: Linear
    share: Tensor  # of a frame's own token in the mixture with its clip's
    eps: float


def prepare(clip: tuple[Tensor, ...], mlp: tuple[Tensor, ...], frame: tuple[Tensor, ...], fusion: tuple[Tensor, ...],
            *, eps: float) -> ClassTokens:
    """From what ``stab_tower.prepare`` is given. Vectors become float32; of an attention the query goes into a bias."""
    mlp_weight, mlp_bias, w1, b1, w2, b2 = mlp
    balance, fusion_weight, fusion_bias, w, b = fusion
    first = Linear(w1.contiguous(), _floats(b1), _floats(mlp_weight), _floats(mlp_bias))
    return ClassTokens(*_attention(*clip), (first, Linear(w2.contiguous(), _floats(b2))), *_attention(*frame),
                       Linear(w.contiguous(), _floats(b), _floats(fusion_weight), _floats(fusion_bias)),
                       torch.sigmoid(_floats(balance)), eps)


def _attention(query: Tensor, norm_weight: Tensor, norm_bias: Tensor, wv: Tensor, bv: Tensor, wp: Tensor,
               bp: Tensor) -> tuple[Linear, Linear]:
    """To the values of each head, and from them all to the query's update."""
    return (Linear(wv.contiguous(), _floats(bv), _floats(norm_weight), _floats(norm_bias)),
            Linear(wp.contiguous(), query.flatten().float() + bp.float()))


def _floats(x: Tensor) -> Tensor:
    return x.float().contiguous()


def run(weights: ClassTokens, clip_pooled: Tensor | None, frame_pooled: Tensor) -> Tensor:
    """float32 ``[B, n, C]`` of the clips (None for images), ``[B * T, n, C]`` of the frames -> ``[B * T, C]``.

    The result is in the weights' dtype.
    """
    dtype, images = weights.fusion.w.dtype, clip_pooled is None
    f, g = apply_both(weights.frame_values, frame_pooled, None if images else weights.clip_values, clip_pooled)
    f, g = apply_both(weights.frame_out, f[:, None], None if images else weights.clip_out,
                      None if g is None else g[:, None], dtype if images else torch.float32)
    if g is None:
        return f
    first, second = weights.mlp
    g = apply(second, apply(first, g, weights.eps, quick_gelu=True), weights.eps, residual=g)
    return apply(weights.fusion, f, weights.eps, clip=g, share=weights.share, dtype=dtype)
