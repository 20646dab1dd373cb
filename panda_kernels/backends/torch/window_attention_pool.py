"""LSD in its folded form: each window's query seen from the tokens, values projected after pooling.

Four products of ``C x C`` a window instead of ten (docs/numerics.md); ``W`` windows, ``H`` heads, ``S`` tokens a
window, ``D = C / H``.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...rectangles import offsets, window_grid
from . import refusals  # noqa: F401
from ._arithmetic import linear, matmul, normalise, normalise_bwd, total, wide

Places = tuple[Tensor, Tensor, Tensor]


def _places(corners: Tensor, num_windows: int, window: int) -> Places:
    """Frame, row and column of each window's tokens, ``[W, S]`` (the frame ``[W, 1]``)."""
    grid = window_grid(corners, window)
    cu_windows = offsets(grid.prod(1))
    item = torch.arange(num_windows, device=corners.device)
    frame = torch.searchsorted(cu_windows, item, right=True) - 1
    local, across = item - cu_windows[frame], grid[frame, 1]
    side = torch.arange(window, device=corners.device)
    rows = (corners[frame, 0] + local // across * window)[:, None] + side.repeat_interleave(window)
    cols = (corners[frame, 2] + local % across * window)[:, None] + side.repeat(window)
    return frame[:, None], rows, cols


def _affine(xhat: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.addcmul(bias.to(xhat.dtype), xhat, weight.to(xhat.dtype)).to(dtype)


def _per_head(x: Tensor, num_heads: int) -> Tensor:
    """``[W, C]`` or ``[C, C]`` by rows' slices -> heads first: ``[H, W, D]``."""
    return x.unflatten(1, (num_heads, -1)).transpose(0, 1)


class _Pooled(NamedTuple):
    """What the gradient recomputes: everything up to the heads' outputs."""

    places: Places
    mean: Tensor  # [W, C] wide: of each window's tokens
    q_in: Tensor  # [W, C]: LN_q(mean)
    q: Tensor  # [H, W, D]
    tokens: Tensor  # [W, S, C] wide: LN_kv(tokens)
    seen: Tensor  # [H, W, C]: Wk_h^T q_h
    weights: Tensor  # [W, H, S] wide
    pooled: Tensor  # [H, W, C]: sum_s weights tokens
    heads: Tensor  # [W, C]: the heads' outputs, before wp


def _pool(x: Tensor, corners: Tensor, num_windows: int, q_norm_weight: Tensor, q_norm_bias: Tensor, wq: Tensor,
          kv_norm_weight: Tensor, kv_norm_bias: Tensor, wkv: Tensor, num_heads: int, window: int, eps: float,
          scale: float) -> _Pooled:
    places = _places(corners, num_windows, window)
    gathered = x[places]
    mean = gathered.mean(1, dtype=wide(x))
    q_in = _affine(normalise(mean, eps)[0], q_norm_weight, q_norm_bias, x.dtype)
    tokens = _affine(normalise(gathered, eps)[0], kv_norm_weight, kv_norm_bias, wide(x))
    wk, wv = wkv.unflatten(0, (2, num_heads, -1))
    q = _per_head(linear(q_in, wq), num_heads)
    seen = matmul(q, wk)
    logits = seen.transpose(0, 1).to(tokens.dtype) @ tokens.mT
    weights = torch.softmax(logits * scale, 2)
    pooled = (weights @ tokens).transpose(0, 1).to(x.dtype)
    heads = matmul(pooled, wv.mT).transpose(0, 1).flatten(1)
    return _Pooled(places, mean, q_in, q, tokens, seen, weights, pooled, heads)


def fwd(x: Tensor, corners: Tensor, num_windows: int, q_norm_weight: Tensor, q_norm_bias: Tensor, wq: Tensor,
        kv_norm_weight: Tensor, kv_norm_bias: Tensor, wkv: Tensor, wp: Tensor, bp: Tensor, num_heads: int,
        window: int, eps: float, scale: float | None) -> Tensor:
    scale = x.shape[-1]**-0.5 if scale is None else scale
    made = _pool(x, corners, num_windows, q_norm_weight, q_norm_bias, wq, kv_norm_weight, kv_norm_bias, wkv,
                 num_heads, window, eps, scale)
    return (made.mean + linear(made.heads, wp, bp)).to(x.dtype)


def bwd(grad: Tensor, x: Tensor, corners: Tensor, num_windows: int, q_norm_weight: Tensor, q_norm_bias: Tensor,
        wq: Tensor, kv_norm_weight: Tensor, kv_norm_bias: Tensor, wkv: Tensor, wp: Tensor, bp: Tensor,
        num_heads: int, window: int, eps: float, scale: float | None, *, needs: list[bool]) -> list[Tensor | None]:
    scale = x.shape[-1]**-0.5 if scale is None else scale
    made = _pool(x, corners, num_windows, q_norm_weight, q_norm_bias, wq, kv_norm_weight, kv_norm_bias, wkv,
                 num_heads, window, eps, scale)
    wk, wv = wkv.unflatten(0, (2, num_heads, -1))

    grad_heads = _per_head(matmul(grad, wp), num_heads)
    grad_wv = matmul(grad_heads.mT, made.pooled)
    grad_pooled = matmul(grad_heads, wv).transpose(0, 1).to(wide(x))
    grad_weights = grad_pooled @ made.tokens.mT
    grad_logits = made.weights * (grad_weights - (made.weights * grad_weights).sum(2, keepdim=True)) * scale
    grad_tokens = made.weights.mT @ grad_pooled + grad_logits.mT @ made.seen.transpose(0, 1).to(wide(x))
    grad_seen = (grad_logits @ made.tokens).transpose(0, 1).to(x.dtype)
    grad_q = matmul(grad_seen, wk.mT).transpose(0, 1).flatten(1)
    grad_wk = matmul(made.q.mT, grad_seen)

    grad_mean, grad_q_weight, grad_q_bias = _norm_bwd(matmul(grad_q, wq).to(wide(x)), made.mean, q_norm_weight, eps)
    grad_gathered, grad_kv_weight, grad_kv_bias = _norm_bwd(grad_tokens, x[made.places], kv_norm_weight, eps)
    grad_x = None
    if needs[0]:
        grad_gathered += (grad_mean + grad)[:, None] / window**2
        grad_x = x.new_zeros(x.shape)
        grad_x[made.places] = grad_gathered.to(x.dtype)
    dtype = x.dtype
    return [grad_x, None, grad_q_weight.to(dtype), grad_q_bias.to(dtype), matmul(grad_q.T, made.q_in),
            grad_kv_weight.to(dtype), grad_kv_bias.to(dtype), torch.stack([grad_wk, grad_wv]).view(wkv.shape),
            matmul(grad.T, made.heads), total(grad).to(dtype)]


def _norm_bwd(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of LayerNorm's input, weight and bias, in the wide dtype."""
    xhat, mean, rstd = normalise(x, eps)
    grad_x = normalise_bwd(grad * weight.to(grad.dtype), x, mean, rstd)
    return grad_x, total(grad * xhat), total(grad)
