"""LSD in its folded form: the kernels of panda_kernels/triton/window_attention_pool*.py between plain products.

The gradients of ``wq`` and ``wp``, plain products over all windows, are torch's.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from ...triton.matmul import multiply
from ...triton.window_attention_pool import head_outputs, locate
from ...triton.window_attention_pool_grad import attention_gradients, mean_gradients, token_gradients, weight_gradients
from ..torch._arithmetic import matmul, total
from . import refusals  # noqa: F401


def forward(attention: Callable[..., Tensor], x: Tensor, corners: Tensor, num_windows: int, q_norm_weight: Tensor,
            q_norm_bias: Tensor, wq: Tensor, kv_norm_weight: Tensor, kv_norm_bias: Tensor, wkv: Tensor, wp: Tensor,
            bp: Tensor, num_heads: int, window: int, eps: float, scale: float | None) -> Tensor:
    """``attention`` is :func:`head_outputs` or another with its arguments."""
    x = x.contiguous()
    found = locate(x, corners.contiguous(), num_windows, q_norm_weight.contiguous(), q_norm_bias.contiguous(), window,
                   eps)
    heads = attention(x, found, multiply(found.query_input, wq.contiguous()), kv_norm_weight.contiguous(),
                      kv_norm_bias.contiguous(), wkv.contiguous(), num_heads, window, _scale(x, scale))
    return multiply(heads, wp.contiguous(), bp.contiguous(), residual=found.mean)


fwd = partial(forward, head_outputs)


def _scale(x: Tensor, scale: float | None) -> float:
    return x.shape[-1]**-0.5 if scale is None else scale


def bwd(grad: Tensor, x: Tensor, corners: Tensor, num_windows: int, q_norm_weight: Tensor, q_norm_bias: Tensor,
        wq: Tensor, kv_norm_weight: Tensor, kv_norm_bias: Tensor, wkv: Tensor, wp: Tensor, bp: Tensor,
        num_heads: int, window: int, eps: float, scale: float | None, *, needs: list[bool]) -> list[Tensor | None]:
    grads: list[Tensor | None] = [None] * len(needs)
    grad = grad.contiguous()
    grads[9] = total(grad).to(grad.dtype) if needs[9] else None
    if not any(needs[:9]):
        return grads
    x, wq, wkv, scale = x.contiguous(), wq.contiguous(), wkv.contiguous(), _scale(x, scale)
    q_weight, kv_norm = q_norm_weight.contiguous(), (kv_norm_weight.contiguous(), kv_norm_bias.contiguous())
    found = locate(x, corners.contiguous(), num_windows, q_weight, q_norm_bias.contiguous(), window, eps)
    q = multiply(found.query_input, wq)
    grad_heads = multiply(grad, wp.contiguous(), transposed=True)
    seen = attention_gradients(x, found, q, grad_heads, *kv_norm, wkv, num_heads, window, scale)

    if needs[0] or any(needs[2:4]) or any(needs[5:7]):
        means = mean_gradients(grad, multiply(seen.grad_q, wq, transposed=True), found, q_weight, seen, eps)
        grads[2:4] = means.q_norm_weight.to(x.dtype), means.q_norm_bias.to(x.dtype)
    if needs[0] or any(needs[5:7]):
        grads[0], *affine = token_gradients(x, found, q, grad_heads, kv_norm[0], wkv, seen, means, num_heads, window)
        grads[5:7] = [a.to(x.dtype) for a in affine]
    if needs[7]:
        grads[7] = weight_gradients(x, found, q, grad_heads, *kv_norm, seen, num_heads, window).to(x.dtype)
    grads[4] = matmul(seen.grad_q.T, found.query_input) if needs[4] else None
    grads[8] = matmul(grad.T, seen.heads) if needs[8] else None
    return grads
