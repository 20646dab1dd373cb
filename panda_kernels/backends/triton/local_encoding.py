"""LSTE by panda_kernels/triton: bottleneck, product up, position encoding. Gradients recompute all but the input."""
from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ...triton.local_encoding import bottleneck, bottleneck_gradient, folded, over_time
from ...triton.matmul import multiply
from ..torch._arithmetic import for_each, matmul, rows, total
from ..torch.local_encoding import first_gradients
from ..torch.patch_embed import composed
from . import depthwise_conv3d, patch_embed, refusals  # noqa: F401


def _folded(*parameters: Tensor) -> tuple[Tensor, Tensor]:
    return folded(*(t.contiguous() for t in parameters))


def _bottleneck(x: Tensor, weight: Tensor, rows: Tensor, pixels: Tensor | None, embedding: Tensor | None,
                present: Tensor | None, *, keep_inner: bool) -> tuple[Tensor | None, Tensor]:
    """Of the tokens in one kernel; of the pixels they were embedded from by a product and a pass over time."""
    if pixels is None or embedding is None:
        return bottleneck(x, weight, rows, keep_inner=keep_inner)
    both = patch_embed.weight_rows(composed(weight, embedding))
    both = F.pad(both, (0, 0, 0, rows.shape[1] - len(both)))
    patches = patch_embed.patch_rows(pixels, embedding.shape[3], x.dtype, present)
    inner = multiply(patches, both, rows[0])
    no_bias = F.pad(rows[1:], (0, 0, 1, 0))
    return inner, over_time(inner, no_bias, x.shape[1], x.shape[2] * x.shape[3])


def _up(over_time: Tensor, w2: Tensor, b2: Tensor, x: Tensor) -> Tensor:
    """x1; ``w2[R, C]``."""
    return multiply(over_time, w2, b2.contiguous(), residual=x, transposed=True).view(x.shape)


def fwd(x: Tensor, norm_scale: Tensor, norm_shift: Tensor, w1: Tensor, b1: Tensor, wt: Tensor, bt: Tensor, w2: Tensor,
        b2: Tensor, wd: Tensor, bd: Tensor, *source: Tensor | None) -> Tensor:
    x = x.contiguous()
    _, mixed = _bottleneck(x, *_folded(w1, b1, norm_scale, norm_shift, wt, bt), *source, keep_inner=False)
    return depthwise_conv3d.fwd(_up(mixed, w2.t().contiguous(), b2, x), wd, bd, True)


def bwd(grad: Tensor, x: Tensor, norm_scale: Tensor, norm_shift: Tensor, w1: Tensor, b1: Tensor, wt: Tensor,
        bt: Tensor, w2: Tensor, b2: Tensor, wd: Tensor, bd: Tensor, *source: Tensor | None,
        needs: list[bool]) -> list[Tensor | None]:
    x, up = x.contiguous(), w2.t().contiguous()
    weight, parameters = _folded(w1, b1, norm_scale, norm_shift, wt, bt)
    inner, mixed = _bottleneck(x, weight, parameters, *source, keep_inner=True)
    assert inner is not None

    x1 = _up(mixed, up, b2, x) if any(needs[9:11]) else x  # read for the taps' gradient only
    grad_x1, grad_wd, grad_bd = depthwise_conv3d.bwd(grad, x1, wd, bd, True,
                                                     needs=[any(needs[:9] + needs[11:]), needs[9], needs[10]])
    del x1
    if grad_x1 is None:
        return for_each(needs, *[None] * 9, grad_wd, grad_bd)
    grad_w2 = matmul(rows(grad_x1).T, mixed[:, :len(up)]) if needs[7] else None
    grad_b2 = total(grad_x1).to(b2.dtype) if needs[8] else None
    if not any(needs[:7] + needs[11:]):
        return for_each(needs, *[None] * 7, grad_w2, grad_b2, grad_wd, grad_bd)

    grad_inner, grad_wt, grad_bt = bottleneck_gradient(grad_x1, up, parameters, inner)
    grad_x = grad_x1
    if source[0] is None and needs[0]:
        grad_x = multiply(grad_inner, weight, residual=rows(grad_x1), transposed=True).view(x.shape)
    norm_grads, of_source = first_gradients(grad_inner[:, :len(up)], x, weight, (norm_scale, norm_shift, w1, b1),
                                            source, needs, patch_embed.bwd)
    of_time = grad_wt.to(wt.dtype), grad_bt.to(bt.dtype)
    return for_each(needs, grad_x, *norm_grads, *of_time, grad_w2, grad_b2, grad_wd, grad_bd, *of_source)
