"""LSD in its folded form, a few products over a list of windows (csrc/core/window_pool.cpp)."""
from __future__ import annotations

import torch
from torch import Tensor

from . import refusals  # noqa: F401
from ._arrays import array, compute_dtype, floats, fold_norm, kernels, pack


def window_weights(dtype: torch.dtype, q_norm_weight: Tensor, q_norm_bias: Tensor, wq: Tensor, kv_norm_weight: Tensor,
                   kv_norm_bias: Tensor, wkv: Tensor, wp: Tensor, bp: Tensor, *,
                   num_heads: int, scale: float) -> list[Tensor]:
    """LayerNorm affines and the scale folded in, in the order of ``window_weights`` in csrc/bindings.cpp.

    The affine of the keys' norm leaves a constant on the logits, which softmax ignores; that of the values' norm goes
    through the projections into the output's bias.
    """
    wk, wv = wkv.chunk(2)
    query, query_bias = fold_norm(scale * q_norm_weight.double(), scale * q_norm_bias.double(), wq)
    keys, _ = fold_norm(kv_norm_weight, kv_norm_bias, wk)
    values, values_bias = fold_norm(kv_norm_weight, kv_norm_bias, wv)
    out_bias = bp.double() + wp.double() @ values_bias.double()
    return [pack(query, dtype), query_bias, pack(keys.unflatten(0, (num_heads, -1)), dtype, transposed=True),
            pack(values.unflatten(0, (num_heads, -1)), dtype), pack(wp, dtype), floats(out_bias)]


def fwd(x: Tensor, corners: Tensor, num_windows: int, q_norm_weight: Tensor, q_norm_bias: Tensor, wq: Tensor,
        kv_norm_weight: Tensor, kv_norm_bias: Tensor, wkv: Tensor, wp: Tensor, bp: Tensor, num_heads: int, window: int,
        eps: float, scale: float | None) -> Tensor:
    channels = x.shape[-1]
    dtype = compute_dtype(x.dtype)
    weights = window_weights(dtype, q_norm_weight, q_norm_bias, wq, kv_norm_weight, kv_norm_bias, wkv, wp, bp,
                             num_heads=num_heads, scale=channels**-0.5 if scale is None else scale)
    y = torch.empty(num_windows, channels, dtype=dtype)
    kernels.window_attention_pool(array(x), corners.contiguous(), weights, num_heads, window, eps, y)
    return y.to(x.dtype)
