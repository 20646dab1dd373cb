"""LSTE by panda_kernels/triton: bottleneck, product up, position encoding. Gradients recompute all but the input."""
from __future__ import annotations

from torch import Tensor

from ...triton.local_encoding import bottleneck, bottleneck_gradient, folded
from ...triton.matmul import multiply
from ..torch._arithmetic import matmul, rows, total
from ..torch.local_encoding import norm_and_w1
from . import depthwise_conv3d, refusals  # noqa: F401


def _folded(*parameters: Tensor) -> tuple[Tensor, Tensor]:
    return folded(*(t.contiguous() for t in parameters))


def _up(over_time: Tensor, w2: Tensor, b2: Tensor, x: Tensor) -> Tensor:
    """x1; ``w2[R, C]``."""
    return multiply(over_time, w2, b2.contiguous(), residual=x, transposed=True).view(x.shape)


def fwd(x: Tensor, norm_scale: Tensor, norm_shift: Tensor, w1: Tensor, b1: Tensor, wt: Tensor, bt: Tensor, w2: Tensor,
        b2: Tensor, wd: Tensor, bd: Tensor) -> Tensor:
    x = x.contiguous()
    _, over_time = bottleneck(x, *_folded(w1, b1, norm_scale, norm_shift, wt, bt), keep_inner=False)
    return depthwise_conv3d.fwd(_up(over_time, w2.t().contiguous(), b2, x), wd, bd, True)


def bwd(grad: Tensor, x: Tensor, norm_scale: Tensor, norm_shift: Tensor, w1: Tensor, b1: Tensor, wt: Tensor,
        bt: Tensor, w2: Tensor, b2: Tensor, wd: Tensor, bd: Tensor, *, needs: list[bool]) -> list[Tensor | None]:
    x, up = x.contiguous(), w2.t().contiguous()
    weight, parameters = _folded(w1, b1, norm_scale, norm_shift, wt, bt)
    inner, over_time = bottleneck(x, weight, parameters, keep_inner=True)
    assert inner is not None

    x1 = _up(over_time, up, b2, x) if any(needs[9:]) else x  # read for the taps' gradient only
    grad_x1, grad_wd, grad_bd = depthwise_conv3d.bwd(grad, x1, wd, bd, True,
                                                     needs=[any(needs[:9]), needs[9], needs[10]])
    del x1
    if grad_x1 is None:
        return [None] * 9 + [grad_wd, grad_bd]
    grad_w2 = matmul(rows(grad_x1).T, over_time[:, :len(up)]) if needs[7] else None
    grad_b2 = total(grad_x1).to(b2.dtype) if needs[8] else None
    if not any(needs[:7]):
        return [None] * 7 + [grad_w2, grad_b2, grad_wd, grad_bd]

    grad_inner, grad_wt, grad_bt = bottleneck_gradient(grad_x1, up, parameters, inner)
    residual = rows(grad_x1)
    grad_x = multiply(grad_inner, weight, residual=residual, transposed=True).view(x.shape) if needs[0] else None
    norm_grads = norm_and_w1(grad_inner[:, :len(up)], x, norm_scale, norm_shift, w1, b1, needs[1:5])
    return [grad_x, *norm_grads, grad_wt.to(wt.dtype), grad_bt.to(bt.dtype), grad_w2, grad_b2, grad_wd, grad_bd]
