"""The whole tower in one call, for inference: 20 launches for clips, 12 for images, and no op boundary between them.

Large plain products are torch's, those with something in their epilogue Triton's (panda_kernels/triton/matmul.py), by
the budget for 8 frames of 448 in bfloat16 on an H100, with 620 TFLOP/s for the library and 450 for Triton:

- patches to x0 and bottleneck, 16.7 G operations in one product of 1728 columns: 27 us, against 37 by Triton;
- temporal convolution: a pass of 23 MB, mostly within L2, 7 us. In the epilogue of a product of its own, which holds
  all frames of 64 positions (``bottleneck``), the 6.6 G operations take over 20 us and cannot share the patches' read;
  as the operand of the product up it would be done eight times, in the way of that product's copies;
- product up, 11.8 G: 26 us with bias and residual in the epilogue, against 19 and a pass of 8 by the library, which
  adds to what lies in its result; of e4m3 operands (``by_fp8``) 15 at 800 TFLOP/s, the convolution writing them where
  it would write bfloat16. To quantise the tokens for a product down of its own would cost what that saves;
- LSD's two products, 4.3 G each and 128 tiles: one round of the multiprocessors either way.

The library chooses its kernel by the number of rows and may sum in another order for few of them, so that x0 of a
single image can differ in a last bit from that image's in a batch. All other kernels here give a row the same bits in
any company.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import fp8
from ...rectangles import Rectangles
from ...triton.assemble_tokens import assemble
from ...triton.attention_pool import pool
from ...triton.depthwise_conv3d import convolve_and_add
from ...triton.local_encoding import over_time, quantised_over_time
from ...triton.matmul import multiply, multiply_scaled
from ...triton.patch_embed import row_length
from ...triton.rectangles import measures
from . import class_tokens, refusals, window_attention_pool  # noqa: F401
from .depthwise_conv3d import tap_rows
from .patch_embed import patch_rows


class Encoding(NamedTuple):
    """LSTE behind the first product: ``rows[5, width]`` are the bottleneck's bias, three taps and their bias."""

    rows: Tensor
    w2: Tensor | fp8.Fp8Weight
    b2: Tensor
    taps: Tensor
    taps_bias: Tensor
    convolve_and_add: Callable[..., tuple[Tensor, Tensor]]


class Prepared(NamedTuple):
    """Folded weights, and the stages that another backend may serve, with theirs.

    ``patches [columns, row_length]`` gives x0, then from column ``inner`` on the bottleneck. ``class_tokens`` takes
    what was pooled of the clips (None for images) and of the frames, in the dtype ``pooled``.
    """

    patches: Tensor
    inner: int
    encoding: Encoding
    clip_queries: Tensor
    window_pool: Callable[[Tensor, Tensor, int], Tensor]  # of x3, corners and the number of windows
    frame_queries: Tensor
    pooled: torch.dtype
    class_tokens: Callable[[Tensor | None, Tensor], Tensor]
    split: Tensor
    patch: int
    window: int
    eps: float


WINDOW_WEIGHTS = ("q_norm_weight", "q_norm_bias", "wq", "kv_norm_weight", "kv_norm_bias", "wkv", "wp", "bp")


def prepare(patch_weight: Tensor, local: tuple[Tensor, ...], clip_queries: Tensor, windows: tuple[Tensor, ...],
            frame_queries: Tensor, split: Tensor, clip_values: tuple[Tensor, ...], mlp: tuple[Tensor, ...],
            frame_values: tuple[Tensor, ...], fusion: tuple[Tensor, ...], *, num_heads: int, window: int,
            eps: float) -> Prepared:
    """Fold a tower; the arguments are those of the cpu backend.

    ``W1 * BN`` is composed with the patch embedding in float64 and rounded once. The bottleneck has a multiple of 64
    channels, zeros behind its own, so that its rows are whole lines and the product up whole blocks.
    """
    norm_scale, norm_shift, w1, b1, wt, bt, w2, b2, wd, bd = local
    dtype, embed, reduced = split.dtype, patch_weight.flatten(1), len(w1)
    channels, spare = len(embed), -reduced % 64
    first = w1.double()
    composed = ((first * norm_scale.double()) @ embed.double()).to(dtype)
    length = row_length(patch_weight.shape[3], dtype)
    stacked = [F.pad(w, (0, length - w.shape[1], 0, -len(w) % below)) for w, below in ((embed, 8), (composed, 64))]
    offset = first @ norm_shift.double() + b1.double()
    rows = torch.cat([offset[None].float(), wt.float().t(), bt[None].float()])
    encoding = Encoding(F.pad(rows, (0, spare)), F.pad(w2, (0, spare)).contiguous(), b2.contiguous(), tap_rows(wd),
                        bd.contiguous(), convolve_and_add)
    named: dict[str, Any] = {name: w.contiguous() for name, w in zip(WINDOW_WEIGHTS, windows, strict=True)}
    window_pool = partial(window_attention_pool.fwd, **named, num_heads=num_heads, window=window, eps=eps, scale=None)
    tail = partial(class_tokens.run, class_tokens.prepare(clip_values, mlp, frame_values, fusion, eps=eps))
    return Prepared(torch.cat(stacked), channels + -channels % 8, encoding, clip_queries.contiguous(), window_pool,
                    frame_queries.contiguous(), torch.float32, tail, split.contiguous(), patch_weight.shape[3], window,
                    eps)


def by_fp8(tower: Prepared) -> Prepared:
    """The same with LSTE's product up in e4m3, for GPUs that multiply it."""
    w2: Any = tower.encoding.w2
    return tower._replace(encoding=tower.encoding._replace(w2=fp8.prepare(w2)))


def run(tower: Prepared, pixels: Tensor, rectangles: Rectangles,
        present: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels ``[B, T, 3 or 4, H, W]`` -> packed tokens in the weights' dtype, ``cu_seqlens`` and ``grid``."""
    corners = rectangles.corners.contiguous()
    measured = measures(corners, tower.window)
    patches = patch_rows(pixels, tower.patch, tower.split.dtype, present)
    B, T, _, H, W = pixels.shape
    grid = B, T, H // tower.patch, W // tower.patch
    clip_pooled = None
    if T == 1:
        x = torch.mm(patches, tower.patches[:tower.split.shape[0]].t())
    else:
        x2, x = _encode(tower, patches, grid)
        clip_pooled = pool(x2.view(B, -1, x2.shape[-1]), tower.clip_queries, None, tower.eps, tower.pooled)
        del x2
    y = tower.window_pool(x.view(B * T, *grid[2:], -1), corners, rectangles.num_windows)
    frame_pooled = pool(y, tower.frame_queries, measured.cu_windows, tower.eps, tower.pooled)
    f = tower.class_tokens(clip_pooled, frame_pooled)
    tokens = assemble(y, f, tower.split, corners, rectangles.num_tokens, tower.window)
    return tokens, measured.cu_seqlens, measured.grids


def _encode(tower: Prepared, patches: Tensor, grid: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
    """``x2`` and ``x3 = x2 + x0``, ``[B, T, h, w, C]``."""
    both, weights = torch.mm(patches, tower.patches.t()), tower.encoding
    x0 = both[:, :tower.split.shape[0]]
    inner, positions = both[:, tower.inner:], grid[2] * grid[3]
    if isinstance(weights.w2, fp8.Fp8Weight):
        mixed, scales = quantised_over_time(inner, weights.rows, grid[1], positions)
        x1 = multiply_scaled(mixed, scales, weights.w2.values, weights.w2.scales, weights.b2, x0)
    else:
        x1 = multiply(over_time(inner, weights.rows, grid[1], positions), weights.w2, weights.b2, residual=x0)
    return weights.convolve_and_add(x1.view(*grid, -1), weights.taps, weights.taps_bias, (3, 3, 3), x0)
