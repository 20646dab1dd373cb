"""LSD in its folded form, a few products over a list of windows (csrc/core/window_pool.cpp)."""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...tuning import Space
from . import refusals  # noqa: F401
from ._arrays import array, compute_dtype, fold_norm, kernels, pack, precise_product
from ._tuning import tune

SPACE = Space("cpu.window_attention_pool", band_tokens=(256, 512, 1024), product_rows=(256, 512, 1024),
              block_windows=(32, 64, 128))


class _Folded(NamedTuple):
    """The op's matrices with affines and scale in them, float32, keys and values a head each."""

    query: Tensor
    query_bias: Tensor
    keys: Tensor  # [H, D, C]
    values: Tensor  # [H, D, C]
    values_bias: Tensor


def _fold(q_norm_weight: Tensor, q_norm_bias: Tensor, wq: Tensor, kv_norm_weight: Tensor, kv_norm_bias: Tensor,
          wkv: Tensor, num_heads: int, scale: float) -> _Folded:
    """The affine of the keys' norm leaves a constant on the logits, which softmax ignores."""
    wk, wv = wkv.chunk(2)
    query, query_bias = fold_norm(scale * q_norm_weight.double(), scale * q_norm_bias.double(), wq)
    keys, _ = fold_norm(kv_norm_weight, kv_norm_bias, wk)
    values, values_bias = fold_norm(kv_norm_weight, kv_norm_bias, wv)
    heads = (num_heads, -1)
    return _Folded(query, query_bias, keys.unflatten(0, heads), values.unflatten(0, heads), values_bias)


def _packed(dtype: torch.dtype, folded: _Folded, wp: Tensor, bp: Tensor) -> list[Tensor]:
    """In the order of ``window_weights`` in csrc/bindings.cpp; what the values' affine adds, in the output's bias."""
    out_bias = bp.float() + precise_product(wp, folded.values_bias)
    return [pack(folded.query, dtype), folded.query_bias, pack(folded.keys, dtype, transposed=True),
            pack(folded.values, dtype), pack(wp, dtype), out_bias]


def window_weights(dtype: torch.dtype, q_norm_weight: Tensor, q_norm_bias: Tensor, wq: Tensor, kv_norm_weight: Tensor,
                   kv_norm_bias: Tensor, wkv: Tensor, wp: Tensor, bp: Tensor, *,
                   num_heads: int, scale: float) -> list[Tensor]:
    folded = _fold(q_norm_weight, q_norm_bias, wq, kv_norm_weight, kv_norm_bias, wkv, num_heads, scale)
    return _packed(dtype, folded, wp, bp)


def fwd(x: Tensor, corners: Tensor, num_windows: int, q_norm_weight: Tensor, q_norm_bias: Tensor, wq: Tensor,
        kv_norm_weight: Tensor, kv_norm_bias: Tensor, wkv: Tensor, wp: Tensor, bp: Tensor, num_heads: int, window: int,
        eps: float, scale: float | None) -> Tensor:
    channels = x.shape[-1]
    dtype = compute_dtype(x.dtype)
    weights = window_weights(dtype, q_norm_weight, q_norm_bias, wq, kv_norm_weight, kv_norm_bias, wkv, wp, bp,
                             num_heads=num_heads, scale=channels**-0.5 if scale is None else scale)
    y = torch.empty(num_windows, channels, dtype=dtype)
    tune(SPACE, y, C=channels, heads=num_heads, window=window, direction="fwd")
    kernels.window_attention_pool(array(x), corners.contiguous(), weights, num_heads, window, eps, y)
    return y.to(x.dtype)


def bwd(grad: Tensor, x: Tensor, corners: Tensor, num_windows: int, q_norm_weight: Tensor, q_norm_bias: Tensor,
        wq: Tensor, kv_norm_weight: Tensor, kv_norm_bias: Tensor, wkv: Tensor, wp: Tensor, bp: Tensor,
        num_heads: int, window: int, eps: float, scale: float | None, *, needs: list[bool]) -> list[Tensor | None]:
    channels, dtype, tokens = x.shape[-1], compute_dtype(x.dtype), array(x)
    scale = channels**-0.5 if scale is None else scale
    folded = _fold(q_norm_weight, q_norm_bias, wq, kv_norm_weight, kv_norm_bias, wkv, num_heads, scale)
    weights = [*_packed(dtype, folded, wp, bp), pack(folded.query, dtype, transposed=True), pack(folded.keys, dtype),
               pack(folded.values, dtype, transposed=True), pack(wp, dtype, transposed=True)]
    grad_x, vector, square = torch.empty_like(tokens), (channels,), (channels, channels)
    sums = [torch.empty(*s) for s in (square, vector, square, square, vector, square, vector)]
    tune(SPACE, tokens, C=channels, heads=num_heads, window=window, direction="bwd")
    kernels.window_attention_pool_gradient(array(grad), tokens, corners.contiguous(), weights, num_heads, window, eps,
                                           grad_x, sums)
    query, query_bias, keys, values, values_bias, out, out_bias = sums
    # From the folded matrices' gradients to those of what was folded.
    q_weight, q_bias, kv_weight, kv_bias = (
        t.float() for t in (q_norm_weight, q_norm_bias, kv_norm_weight, kv_norm_bias))
    precise_q, (wk, wv) = wq.float(), wkv.float().chunk(2)
    grads = [
        scale * (precise_q * query).sum(0), scale * (query_bias.double() @ precise_q.double()),
        scale * torch.addcmul(torch.outer(query_bias, q_bias), query, q_weight),
        (wk * keys + wv * values).sum(0), values_bias.double() @ wv.double(),
        torch.cat([keys * kv_weight, torch.addcmul(torch.outer(values_bias, kv_bias), values, kv_weight)]),
        torch.addr(out, out_bias, folded.values_bias), out_bias]
    inputs = (q_norm_weight, q_norm_bias, wq, kv_norm_weight, kv_norm_bias, wkv, wp, bp)
    return [grad_x.to(x.dtype), None, *(g.to(t.dtype) for g, t in zip(grads, inputs, strict=True))]
