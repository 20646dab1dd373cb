"""LSD in its folded form, a few products over a list of windows (csrc/core/window_pool.cpp)."""
from __future__ import annotations

import torch
from torch import Tensor

from . import refusals  # noqa: F401
from ._arrays import array, compute_dtype, floats, kernels, pack


def window_weights(dtype: torch.dtype, q_norm_weight: Tensor, q_norm_bias: Tensor, wq: Tensor, kv_norm_weight: Tensor,
                   kv_norm_bias: Tensor, wkv: Tensor, wp: Tensor, bp: Tensor, *,
                   num_heads: int, scale: float) -> list[Tensor]:
    """LayerNorm affines and the scale folded in, in the order of ``window_weights`` in csrc/bindings.cpp.

    The affine of the keys' norm leaves a constant on the logits, which softmax ignores; that of the values' norm goes
    through the projections into the output's bias.
    """
    wq, wp = wq.double(), wp.double()
    wk, wv = wkv.double().chunk(2)
    query = wq * q_norm_weight.double() * scale
    query_bias = wq @ q_norm_bias.double() * scale
    keys = (wk * kv_norm_weight.double()).unflatten(0, (num_heads, -1))
    values = (wv * kv_norm_weight.double()).unflatten(0, (num_heads, -1))
    out_bias = bp.double() + wp @ (wv @ kv_norm_bias.double())
    return [pack(query, dtype), floats(query_bias), pack(keys, dtype, transposed=True), pack(values, dtype),
            pack(wp, dtype), floats(out_bias)]


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
