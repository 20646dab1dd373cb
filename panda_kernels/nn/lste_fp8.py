"""LSTE in inference with ``W1`` and ``W2`` in FP8 (panda_kernels/fp8.py); the convolutions stay what they are."""
from __future__ import annotations

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from .. import fp8, ops
from .lste import LocalMHRA, batch_norm_affine, encoding_weights


class Fp8Encoding(NamedTuple):
    """The weights of :func:`encode`; the bottleneck has the next multiple of 16 channels, those added being zero."""

    down: fp8.Fp8Weight
    taps: Tensor
    taps_bias: Tensor
    up: fp8.Fp8Weight
    position: Tensor
    position_bias: Tensor


def prepare(mhra: LocalMHRA, dpe: nn.Conv3d) -> Fp8Encoding:
    """Quantise, BatchNorm's running statistics folded into ``W1`` first."""
    norm: Any = mhra.pos_embed[0]
    scale, shift, w1, b1, wt, bt, w2, b2, wd, bd = encoding_weights(mhra, dpe, batch_norm_affine(norm))
    more = -len(w1) % fp8.MULTIPLE
    precise = w1.to(scale.dtype)
    bias = F.linear(shift, precise, b1.to(scale.dtype))
    return Fp8Encoding(fp8.prepare(F.pad(precise * scale, (0, 0, 0, more)), F.pad(bias, (0, more))),
                       F.pad(wt, (0, 0, 0, more))[:, None, :, None, None], F.pad(bt, (0, more)), fp8.prepare(w2, b2),
                       wd, bd)


def encode(x: Tensor, weights: Fp8Encoding, *, backend: str = "auto") -> Tensor:
    """``x0 [B, T, h, w, C]`` -> ``x2`` of that shape and dtype; ``backend`` is the convolutions'."""
    grid = x.shape[:-1]
    inner = fp8.product(fp8.quantise(x), weights.down, x.dtype).view(*grid, -1)
    over_time = ops.depthwise_conv3d(inner, weights.taps, weights.taps_bias, backend=backend)
    x1 = fp8.product(fp8.quantise(over_time), weights.up, x.dtype).view(x.shape).add_(x)
    return ops.depthwise_conv3d(x1, weights.position, weights.position_bias, residual=True, backend=backend)
