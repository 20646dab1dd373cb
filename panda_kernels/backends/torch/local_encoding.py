"""LSTE with the norm folded into the product after it, the rest through the depthwise convolution.

Gradients recompute the two bottleneck activations and x1 instead of storing them (docs/numerics.md).
"""
from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from . import depthwise_conv3d, patch_embed, refusals  # noqa: F401
from ._arithmetic import for_each, linear, matmul, rows, total, wide

Gradients = list[Tensor | None]


def _folded(x: Tensor, norm_scale: Tensor, norm_shift: Tensor, w1: Tensor, b1: Tensor) -> tuple[Tensor, Tensor]:
    """W1 and b1 with the norm's affine in them, composed in the wide dtype."""
    precise = w1.to(wide(x))
    weight = precise * norm_scale.to(precise.dtype)
    bias = F.linear(norm_shift.to(precise.dtype), precise, b1.to(precise.dtype))
    return weight.to(x.dtype), bias.to(x.dtype)


def _first(x: Tensor, weight: Tensor, bias: Tensor, pixels: Tensor | None, embedding: Tensor | None,
           present: Tensor | None) -> Tensor:
    """The bottleneck, from the tokens or from the pixels they were embedded from."""
    if pixels is None or embedding is None:
        return linear(x, weight, bias)
    both = patch_embed.composed(weight, embedding).flatten(1)
    return linear(patch_embed.patch_rows(pixels, embedding, present), both, bias)


def _taps(wt: Tensor) -> Tensor:
    return wt[:, None, :, None, None]


def fwd(x: Tensor, norm_scale: Tensor, norm_shift: Tensor, w1: Tensor, b1: Tensor, wt: Tensor, bt: Tensor, w2: Tensor,
        b2: Tensor, wd: Tensor, bd: Tensor, *source: Tensor | None) -> Tensor:
    inner = _first(x, *_folded(x, norm_scale, norm_shift, w1, b1), *source)
    over_time = depthwise_conv3d.fwd(inner, _taps(wt), bt, False)
    return depthwise_conv3d.fwd(linear(over_time, w2, b2).add_(x), wd, bd, True)


def bwd(grad: Tensor, x: Tensor, norm_scale: Tensor, norm_shift: Tensor, w1: Tensor, b1: Tensor, wt: Tensor,
        bt: Tensor, w2: Tensor, b2: Tensor, wd: Tensor, bd: Tensor, pixels: Tensor | None, embedding: Tensor | None,
        present: Tensor | None, *, needs: list[bool]) -> list[Tensor | None]:
    weight, bias = _folded(x, norm_scale, norm_shift, w1, b1)
    inner = _first(x, weight, bias, pixels, embedding, present)
    over_time = depthwise_conv3d.fwd(inner, _taps(wt), bt, False)
    x1 = linear(over_time, w2, b2).add_(x)

    grad_x1, grad_wd, grad_bd = depthwise_conv3d.bwd(grad, x1, wd, bd, True, needs=[True, needs[9], needs[10]])
    del x1
    assert grad_x1 is not None
    grad_w2 = matmul(rows(grad_x1).T, rows(over_time)) if needs[7] else None
    grad_b2 = total(grad_x1).to(x.dtype) if needs[8] else None
    if not any(needs[:7] + needs[11:]):
        return for_each(needs, *[None] * 7, grad_w2, grad_b2, grad_wd, grad_bd)

    grad_inner, grad_taps, grad_bt = depthwise_conv3d.bwd(
        matmul(grad_x1, w2), inner, _taps(wt), bt, False, needs=[True, needs[5], needs[6]])
    assert grad_inner is not None
    grad_x = grad_x1
    if pixels is None and needs[0]:
        grad_x = matmul(grad_inner, weight).add_(grad_x1)
    norm_grads, of_source = first_gradients(grad_inner, x, weight, (norm_scale, norm_shift, w1, b1),
                                            (pixels, embedding, present), needs, patch_embed.bwd)
    grad_wt = None if grad_taps is None else grad_taps.view(wt.shape)
    return for_each(needs, grad_x, *norm_grads, grad_wt, grad_bt, grad_w2, grad_b2, grad_wd, grad_bd, *of_source)


def first_gradients(grad_inner: Tensor, x: Tensor, weight: Tensor, parameters: tuple[Tensor, ...],
                    source: tuple[Tensor | None, ...], needs: list[bool],
                    embedding_bwd: Callable[..., Gradients]) -> tuple[Gradients, Gradients]:
    """From the gradient of the bottleneck those of the norm's scale and shift, of w1 and b1, which are the
    ``parameters``, and, if there are pixels, those of the pixels and of the embedding.

    ``weight`` is w1 with the norm in it, ``embedding_bwd`` the gradient of ``patch_embed``.
    """
    if not any(needs[1:5] + needs[11:]):
        return [None] * 4, []
    pixels, embedding, present = source
    if pixels is None or embedding is None:
        return norm_and_w1(matmul(rows(grad_inner).T, rows(x)), grad_inner, *parameters), []
    shape = len(weight), *embedding.shape[1:]  # all that the weight's gradient asks of it
    both = patch_embed.composed(weight, embedding) if needs[11] else weight.new_empty(shape)
    grad_pixels, found = embedding_bwd(grad_inner, pixels, both, present, needs=[needs[11], True])
    assert found is not None
    moments = found.flatten(1)
    grad_embedding = matmul(weight.T, moments).view(embedding.shape)
    products = matmul(moments, embedding.flatten(1).T)
    return norm_and_w1(products, grad_inner, *parameters), [grad_pixels, grad_embedding]


def norm_and_w1(products: Tensor, grad_inner: Tensor, norm_scale: Tensor, norm_shift: Tensor, w1: Tensor,
                b1: Tensor) -> Gradients:
    """Gradients of the norm's scale and shift, of w1 and b1, all from one product ``grad_inner^T x``."""
    sums = total(grad_inner)
    products, precise = products.to(sums.dtype), w1.to(sums.dtype)
    grad_w1 = products * norm_scale.to(precise.dtype) + sums[:, None] * norm_shift.to(precise.dtype)
    return [(precise * products).sum(0).to(norm_scale.dtype), (sums.double() @ precise.double()).to(norm_shift.dtype),
            grad_w1.to(w1.dtype), sums.to(b1.dtype)]
