"""LSD in its folded form, a few products over a list of windows (csrc/core/window_pool.cpp)."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...tuning import Space
from . import refusals  # noqa: F401
from ._arrays import (
    PANEL,
    added_by,
    array,
    column_products,
    compute_dtype,
    kernels,
    pack_all,
    precise_product,
    result,
    result_like,
    scale_columns,
)
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
    keys, values = (scale_columns(w, kv_norm_weight).unflatten(0, (num_heads, -1)) for w in (wk, wv))
    return _Folded(scale_columns(wq, scale * q_norm_weight.double()), added_by(scale * q_norm_bias.double(), wq), keys,
                   values, added_by(kv_norm_bias, wv))


def window_weights(dtype: torch.dtype, q_norm_weight: Tensor, q_norm_bias: Tensor, wq: Tensor, kv_norm_weight: Tensor,
                   kv_norm_bias: Tensor, wkv: Tensor, wp: Tensor, bp: Tensor, *, num_heads: int, scale: float,
                   embedding: Tensor | None = None) -> list[Tensor]:
    """In the order of ``window_weights`` in csrc/bindings.cpp; what the values' affine adds, in the output's bias.

    ``embedding [C, K]``, its columns without mean, is composed with what else would meet its products with patches.
    """
    folded = _fold(q_norm_weight, q_norm_bias, wq, kv_norm_weight, kv_norm_bias, wkv, num_heads, scale)
    met = [folded.query, folded.keys, folded.values]
    if embedding is not None:
        met = [precise_product(w.view(-1, w.shape[-1]), embedding).view(*w.shape[:-1], -1) for w in met]
    query, keys, values, out = pack_all(dtype, (met[0], False), (met[1], True), (met[2], False), (wp, False))
    out_bias = bp.float() + added_by(folded.values_bias, wp)
    return [query, folded.query_bias, keys, values, out, out_bias]


def fwd(*inputs: Any) -> Tensor:
    return _pool(*inputs, kept=[])


def keep(x: Tensor, corners: Tensor, num_windows: int, *others: Any,
         added: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    """Of the tokens ``x + added``, where there is something added."""
    dtype, channels = compute_dtype(x.dtype), x.shape[-1]
    padding = 0 if dtype == torch.float32 else -channels % PANEL
    kept = [result(num_windows, channels + padding, dtype=dtype) for _ in range(2)]
    if padding:
        for rows in kept:
            rows[:, channels:].zero_()
    y = _pool(x, corners, num_windows, *others, kept=kept, added=added)
    return y, kept if added is None else [*kept, added]


def _pool(x: Tensor, corners: Tensor, num_windows: int, q_norm_weight: Tensor, q_norm_bias: Tensor, wq: Tensor,
          kv_norm_weight: Tensor, kv_norm_bias: Tensor, wkv: Tensor, wp: Tensor, bp: Tensor, num_heads: int,
          window: int, eps: float, scale: float | None, *, kept: list[Tensor], added: Tensor | None = None) -> Tensor:
    """``kept`` receives the projected queries and the heads' outputs, unless it is empty."""
    channels = x.shape[-1]
    dtype = compute_dtype(x.dtype)
    weights = window_weights(dtype, q_norm_weight, q_norm_bias, wq, kv_norm_weight, kv_norm_bias, wkv, wp, bp,
                             num_heads=num_heads, scale=channels**-0.5 if scale is None else scale)
    y = result(num_windows, channels, dtype=dtype)
    tune(SPACE, y, C=channels, heads=num_heads, window=window, direction="fwd")
    more = None if added is None else array(added)
    kernels.window_attention_pool(array(x), more, corners.contiguous(), weights, num_heads, window, eps, y, kept)
    return y.to(x.dtype)


def _return_weights(dtype: torch.dtype, folded: _Folded, wp: Tensor, *, again: bool) -> list[Tensor]:
    """In the order of the gradient in csrc/bindings.cpp, which computes queries and heads' outputs ``again`` or not."""
    more = ((folded.query, False), (folded.values, False)) if again else ()
    weights = list(pack_all(dtype, (folded.keys, True), (folded.query, True), (folded.keys, False),
                            (folded.values, True), (wp, True), *more))
    return [*weights[:6], folded.query_bias, weights[6]] if again else weights


def bwd(grad: Tensor, x: Tensor, corners: Tensor, num_windows: int, q_norm_weight: Tensor, q_norm_bias: Tensor,
        wq: Tensor, kv_norm_weight: Tensor, kv_norm_bias: Tensor, wkv: Tensor, wp: Tensor, bp: Tensor,
        num_heads: int, window: int, eps: float, scale: float | None, *, needs: list[bool],
        kept: Sequence[Tensor] = ()) -> list[Tensor | None]:
    """That of ``x`` is the gradient of the tokens, of which what was added is a part."""
    channels, dtype, tokens = x.shape[-1], compute_dtype(x.dtype), array(x)
    computed, added = list(kept[:2]), next(map(array, kept[2:]), None)
    scale = channels**-0.5 if scale is None else scale
    folded = _fold(q_norm_weight, q_norm_bias, wq, kv_norm_weight, kv_norm_bias, wkv, num_heads, scale)
    weights, values_offset = _return_weights(dtype, folded, wp, again=not computed), folded.values_bias
    del folded
    grad_x = result_like(tokens)
    query, keys_values, out = (result(n * channels, channels, dtype=torch.float32) for n in (1, 2, 1))
    query_bias, values_bias, out_bias = (torch.empty(channels) for _ in range(3))
    tune(SPACE, tokens, C=channels, heads=num_heads, window=window, direction="bwd")
    kernels.window_attention_pool_gradient(
        array(grad), tokens, added, corners.contiguous(), weights, num_heads, window, eps, computed, grad_x,
        [query, query_bias, *keys_values.chunk(2), values_bias, out, out_bias])
    del weights
    # From the folded matrices' gradients to those of what was folded, the large ones in place.
    q_weight, q_bias, kv_weight, kv_bias = (
        t.float() for t in (q_norm_weight, q_norm_bias, kv_norm_weight, kv_norm_bias))
    precise_q, precise_kv = wq.float(), wkv.float()
    q_norm = scale * column_products(precise_q, query), scale * column_products(precise_q, query_bias[:, None])
    kv_norm = column_products(precise_kv, keys_values), column_products(precise_kv[channels:], values_bias[:, None])
    query.mul_(q_weight).addr_(query_bias, q_bias).mul_(scale)
    keys_values.mul_(kv_weight)[channels:].addr_(values_bias, kv_bias)
    grads = [*q_norm, query, *kv_norm, keys_values, out.addr_(out_bias, values_offset), out_bias]
    inputs = (q_norm_weight, q_norm_bias, wq, kv_norm_weight, kv_norm_bias, wkv, wp, bp)
    return [grad_x.to(x.dtype), None, *(g.to(t.dtype) for g, t in zip(grads, inputs, strict=True))]
