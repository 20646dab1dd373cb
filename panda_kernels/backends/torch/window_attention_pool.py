"""LSD in its folded form: each window's query seen from the tokens, values projected after pooling.

Four products of ``C x C`` a window instead of ten (docs/numerics.md); ``W`` windows, ``H`` heads, ``S`` tokens a
window, ``D = C / H``.
"""
from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...rectangles import offsets, window_grid
from . import refusals  # noqa: F401
from ._arithmetic import linear, matmul, normalise, normalise_bwd, total, wide

# The folded form's [windows, heads, C] intermediates should stay in a CPU's caches.
CPU_CHUNK = 256

Places = tuple[Tensor, ...]


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


def _chunks(corners: Tensor, num_windows: int, window: int) -> Iterator[tuple[slice, Places]]:
    places = _places(corners, num_windows, window)
    step = CPU_CHUNK if corners.device.type == "cpu" else num_windows
    for begin in range(0, num_windows, step):
        part = slice(begin, begin + step)
        yield part, tuple(p[part] for p in places)


class _Weights(NamedTuple):
    """The op's arguments as both directions use them."""

    q_norm: tuple[Tensor, Tensor]  # weight and bias, wide
    wq: Tensor
    kv_norm: tuple[Tensor, Tensor]
    wk: Tensor  # [H, D, C]
    wv: Tensor  # [H, D, C]
    num_heads: int
    eps: float
    scale: float


def _weights(x: Tensor, q_norm_weight: Tensor, q_norm_bias: Tensor, wq: Tensor, kv_norm_weight: Tensor,
             kv_norm_bias: Tensor, wkv: Tensor, num_heads: int, eps: float, scale: float | None) -> _Weights:
    dtype = wide(x)
    wk, wv = wkv.unflatten(0, (2, num_heads, -1))
    return _Weights((q_norm_weight.to(dtype), q_norm_bias.to(dtype)), wq,
                    (kv_norm_weight.to(dtype), kv_norm_bias.to(dtype)), wk, wv, num_heads, eps,
                    x.shape[-1]**-0.5 if scale is None else scale)


class _Norm(NamedTuple):
    """A LayerNorm in the wide dtype and what its gradient needs."""

    x: Tensor
    xhat: Tensor
    mean: Tensor
    rstd: Tensor
    affine: Tensor

    def bwd(self, grad: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the input, the weight and the bias."""
        grad_x = normalise_bwd(grad * weight, self.x, self.mean, self.rstd)
        return grad_x, total(grad * self.xhat), total(grad)


def _norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> _Norm:
    xhat, mean, rstd = normalise(x, eps)
    return _Norm(x, xhat, mean, rstd, torch.addcmul(bias, xhat, weight))


class _Pooled(NamedTuple):
    """A chunk up to the heads' outputs: what the gradient recomputes."""

    mean: Tensor  # [W, C] wide: of each window's tokens
    q_norm: _Norm  # of the mean
    q: Tensor  # [H, W, D]
    kv_norm: _Norm  # of the tokens, [W, S, C]
    seen: Tensor  # [H, W, C]: Wk_h^T q_h
    weights: Tensor  # [W, H, S] wide
    pooled: Tensor  # [H, W, C]: sum_s weights tokens
    heads: Tensor  # [W, C]: the heads' outputs, before wp


def _per_head(x: Tensor, num_heads: int) -> Tensor:
    """``[W, C]`` -> ``[H, W, D]``."""
    return x.unflatten(1, (num_heads, -1)).transpose(0, 1)


def _pool(x: Tensor, places: Places, w: _Weights) -> _Pooled:
    gathered = x[places]
    mean = gathered.mean(1, dtype=wide(x))
    q_norm = _norm(mean, *w.q_norm, w.eps)
    kv_norm = _norm(gathered, *w.kv_norm, w.eps)
    q = _per_head(linear(q_norm.affine.to(x.dtype), w.wq), w.num_heads)
    seen = matmul(q, w.wk)
    logits = seen.transpose(0, 1).to(mean.dtype) @ kv_norm.affine.mT
    weights = torch.softmax(logits * w.scale, 2)
    pooled = (weights @ kv_norm.affine).to(x.dtype).transpose(0, 1)
    heads = matmul(pooled, w.wv.mT).transpose(0, 1).flatten(1)
    return _Pooled(mean, q_norm, q, kv_norm, seen, weights, pooled, heads)


def fwd(x: Tensor, corners: Tensor, num_windows: int, q_norm_weight: Tensor, q_norm_bias: Tensor, wq: Tensor,
        kv_norm_weight: Tensor, kv_norm_bias: Tensor, wkv: Tensor, wp: Tensor, bp: Tensor, num_heads: int,
        window: int, eps: float, scale: float | None) -> Tensor:
    w = _weights(x, q_norm_weight, q_norm_bias, wq, kv_norm_weight, kv_norm_bias, wkv, num_heads, eps, scale)
    y = x.new_empty(num_windows, x.shape[-1])
    for part, places in _chunks(corners, num_windows, window):
        made = _pool(x, places, w)
        y[part] = made.mean + linear(made.heads, wp, bp)
    return y


def bwd(grad: Tensor, x: Tensor, corners: Tensor, num_windows: int, q_norm_weight: Tensor, q_norm_bias: Tensor,
        wq: Tensor, kv_norm_weight: Tensor, kv_norm_bias: Tensor, wkv: Tensor, wp: Tensor, bp: Tensor,
        num_heads: int, window: int, eps: float, scale: float | None, *, needs: list[bool]) -> list[Tensor | None]:
    w = _weights(x, q_norm_weight, q_norm_bias, wq, kv_norm_weight, kv_norm_bias, wkv, num_heads, eps, scale)
    grad_x = x.new_zeros(x.shape) if needs[0] else None
    inputs = (q_norm_weight, q_norm_bias, wq, kv_norm_weight, kv_norm_bias, wkv, wp, bp)
    sums = [torch.zeros_like(t, dtype=wide(x)) for t in inputs]
    for part, places in _chunks(corners, num_windows, window):
        grad_gathered, grads = _chunk_bwd(grad[part], _pool(x, places, w), w, wp)
        if grad_x is not None:
            grad_x[places] = grad_gathered.to(x.dtype)
        for running, g in zip(sums, grads, strict=True):
            running += g.view(running.shape)
    return [grad_x, None, *(s.to(x.dtype) for s in sums)]


def _chunk_bwd(grad: Tensor, made: _Pooled, w: _Weights, wp: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The gradients of a chunk's tokens ``[W, S, C]`` and of the op's eight weights, in the op's order."""
    dtype, tokens = made.mean.dtype, made.kv_norm.affine
    grad_heads = _per_head(matmul(grad, wp), w.num_heads)
    grad_pooled = matmul(grad_heads, w.wv).transpose(0, 1).to(dtype)
    grad_weights = grad_pooled @ tokens.mT
    grad_logits = made.weights * (grad_weights - (made.weights * grad_weights).sum(2, keepdim=True)) * w.scale
    grad_tokens = made.weights.mT @ grad_pooled + grad_logits.mT @ made.seen.transpose(0, 1).to(dtype)
    grad_seen = (grad_logits @ tokens).to(grad.dtype).transpose(0, 1)
    grad_q = matmul(grad_seen, w.wk.mT).transpose(0, 1).flatten(1)

    grad_mean, *q_norm_grads = made.q_norm.bwd(matmul(grad_q, w.wq).to(dtype), w.q_norm[0])
    grad_gathered, *kv_norm_grads = made.kv_norm.bwd(grad_tokens, w.kv_norm[0])
    grad_gathered += (grad_mean + grad)[:, None] / tokens.shape[1]
    grad_wkv = torch.stack([matmul(made.q.mT, grad_seen), matmul(grad_heads.mT, made.pooled)])
    return grad_gathered, [*q_norm_grads, matmul(grad_q.T, made.q_norm.affine.to(grad.dtype)), *kv_norm_grads,
                           grad_wkv, matmul(grad.T, made.heads), total(grad)]
