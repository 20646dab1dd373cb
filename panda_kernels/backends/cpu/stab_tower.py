"""The whole tower streamed through the caches (csrc/core/tower.cpp), for inference."""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...rectangles import Rectangles
from ...tuning import Space
from . import class_tokens, refusals  # noqa: F401
from ._arrays import compute_dtype, floats, fold_norm, kernels, pack, precise_product, result
from ._tuning import tune
from .class_tokens import FusionWeights, MLPWeights, ValueWeights
from .local_encoding import streamed_weights
from .patch_embed import normalisation, readable
from .window_attention_pool import window_weights

SPACE = Space("cpu.stab_tower", band_tokens=(256, 512, 1024, 2048), product_rows=(256, 512, 1024),
              block_windows=(32, 64, 128))


class Streamed(NamedTuple):
    """Weights folded and packed, in the order of ``stab_tower`` in csrc/bindings.cpp, and the sizes they imply."""

    weights: list[Tensor]
    class_tokens: class_tokens.ClassTokens
    dtype: torch.dtype
    channels: int
    patch: int
    reduced: int
    num_heads: int
    window: int
    eps: float


def prepare(patch_weight: Tensor, local: tuple[Tensor, ...], clip_queries: Tensor, windows: tuple[Tensor, ...],
            frame_queries: Tensor, split: Tensor, clip_values: tuple[Tensor, ...], mlp: tuple[Tensor, ...],
            frame_values: tuple[Tensor, ...], fusion: tuple[Tensor, ...], *, num_heads: int, window: int,
            eps: float) -> Streamed:
    """Fold and pack a tower.

    ``local`` are the arguments of ``local_encoding`` after x, ``windows`` those of ``window_attention_pool`` from
    ``q_norm_weight`` to ``bp``; the queries are ``[n, C]``, folded; the last four are those of ``class_tokens``. LSTE's
    first product is composed with the patch embedding, so that one read of the pixels gives both.
    """
    dtype = compute_dtype(split.dtype)
    channels, _, patch, _ = patch_weight.shape
    embed = patch_weight.flatten(1)
    norm_scale, norm_shift, w1, b1, *after = local
    first, first_bias = fold_norm(norm_scale, norm_shift, w1)
    squeeze = pack(precise_product(first, embed), dtype)
    del first
    weights = [pack(embed, dtype), squeeze, first_bias + b1.float(), *streamed_weights(dtype, *after),
               floats(clip_queries), *window_weights(dtype, *windows, num_heads=num_heads, scale=channels**-0.5),
               floats(frame_queries), split.to(dtype).contiguous()]
    last = class_tokens.prepare(ValueWeights(*clip_values), MLPWeights(*mlp), ValueWeights(*frame_values),
                                FusionWeights(*fusion), clip_heads=len(clip_queries), frame_heads=len(frame_queries),
                                eps=eps)
    return Streamed(weights, last, dtype, channels, patch, w1.shape[0], num_heads, window, eps)


def run(tower: Streamed, pixels: Tensor, rectangles: Rectangles,
        present: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels ``[B, T, 3 or 4, H, W]`` -> packed tokens in the dtype of computation, ``cu_seqlens`` and ``grid``."""
    clips, frames = pixels.shape[:2]
    clip_queries, frame_queries = tower.weights[9], tower.weights[16]
    tokens = result(rectangles.num_tokens, tower.channels, dtype=tower.dtype)
    clip_pooled = torch.empty(clips if frames > 1 else 0, *clip_queries.shape)
    frame_pooled = torch.empty(clips * frames, *frame_queries.shape)
    tune(SPACE, tokens, C=tower.channels, R=tower.reduced, heads=tower.num_heads, patch=tower.patch,
         window=tower.window)
    kernels.stab_tower(readable(pixels), None if present is None else present.contiguous(), normalisation(),
                       rectangles.corners.contiguous(), tower.weights, tower.patch, tower.reduced, tower.num_heads,
                       tower.window, tower.eps, tokens, clip_pooled, frame_pooled)
    last = class_tokens.run(tower.class_tokens, clip_pooled, frame_pooled)
    cu_seqlens = rectangles.cu_seqlens(tower.window)
    tokens[cu_seqlens[:-1]] = last.to(tower.dtype)
    return tokens, cu_seqlens, rectangles.grid(tower.window)
