"""Gradients of the windows' attention, all recomputed from the op's inputs (docs/numerics.md).

``attend_gradient`` is the walk of ``attend`` with ``Wv_h^T G(o_h)`` beside the folded query. It leaves the attention's
weights and their gradients, ``[H, S, W]``, from which the rest follows in products that keep ``[windows, heads, C]`` on
chip as well: the tokens' gradient is one with K = 2C, that of a weight one over the windows, whose right side, a
weighted sum of tokens, is made as it is needed. The two means over channels that the tokens' LayerNorm needs are sums
of scalars a head.
"""
from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuning import Space, choose
from ._launch import cdiv, launch, next_power_of_2
from ._precision import input_precision
from .window_attention_pool import (
    ROWS,
    TILES,
    Tile,
    Windows,
    attend_tile,
    centred,
    fold,
    head_block,
    head_rows,
    meet,
    moments,
    project,
    replaced,
    row_tile,
    scaled,
    softmax,
    store_head,
    token_values,
    weight_tile,
    weighted_sums,
)

SEGMENTS = 4  # shares of the windows in the weights' gradients
MEAN_SEGMENTS = 128  # and in those of the query's norm
ATTEND_GRADIENT = Space("triton.window_attention_pool_grad.attend_gradient", **TILES)
MEAN_GRADIENT = Space("triton.window_attention_pool_grad.mean_gradient", **ROWS)
TOKEN_GRADIENT = Space("triton.window_attention_pool_grad.token_gradient", **TILES)
WEIGHT_GRADIENT = Space("triton.window_attention_pool_grad.weight_gradient",
                        **TILES | {"block_w": (16, 32, 64)})


@triton.jit(do_not_specialize=["w", "W", "scale"])
def attend_gradient(x, places, norms, q, grad_heads, norm_weight, norm_bias, wkv, heads, grad_q, saved, w, W, scale,
                    C: tl.constexpr, H: tl.constexpr, SIDE: tl.constexpr, PRECISION: tl.constexpr,
                    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr):
    """The heads' outputs again, the gradient of ``q``, and ``saved[4, H, S, W]``.

    Of a head and a token these are its weight and the gradient of its logit, both over the token's deviation, and
    its parts of the sums over channels of ``G(xhat)`` and of ``G(xhat) * xhat``.
    """
    D: tl.constexpr = C // H
    D_TILES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    S: tl.constexpr = SIDE * SIDE
    pid = tl.program_id(0)
    head = pid % H
    window = pid // H * BLOCK_W + tl.arange(0, BLOCK_W)[:, None]
    inside = window < W
    place = tl.load(places + window, mask=inside, other=0)
    means = token_values(norms, window, W, S)

    queries = ()
    outer = ()
    for j in tl.static_range(D_TILES):
        queries += (head_rows(q, window, head, j, W, C, D, BLOCK_D),)
        outer += (head_rows(grad_heads, window, head, j, W, C, D, BLOCK_D),)
    products = (tl.zeros([BLOCK_W, 1], tl.float32),) * (2 * S)
    query_sum = tl.zeros([BLOCK_W, 1], tl.float32)
    outer_sum = tl.zeros([BLOCK_W, 1], tl.float32)
    for c0 in tl.range(0, C, BLOCK_C, num_stages=2):  # tokens too: they feed no product
        c = c0 + tl.arange(0, BLOCK_C)[None, :]
        gamma = tl.load(norm_weight + c, mask=c < C, other=0.0).to(tl.float32)
        query = fold(queries, wkv, head, c, C, D, BLOCK_D, PRECISION) * gamma
        value = fold(outer, wkv + C * C, head, c, C, D, BLOCK_D, PRECISION) * gamma
        query_sum += tl.sum(query, axis=1, keep_dims=True)
        outer_sum += tl.sum(value, axis=1, keep_dims=True)
        products = meet((query, value), x, place, inside, w, c, means, C, SIDE, products)

    rstds = token_values(norms + S * W, window, W, S)
    products = scaled(products, rstds + rstds)
    weights = softmax(products[:S], scale)
    expected = tl.zeros([BLOCK_W, 1], tl.float32)
    for s in tl.static_range(S):
        expected += weights[s] * products[S + s]
    grad_logits = ()
    for s in tl.static_range(S):
        grad_logits += (weights[s] * (products[S + s] - expected) * scale,)
        here = saved + (head * S + s) * W + window
        tl.store(here, weights[s] * rstds[s], mask=inside)
        tl.store(here + S * H * W, grad_logits[s] * rstds[s], mask=inside)
        tl.store(here + 2 * S * H * W, weights[s] * outer_sum + grad_logits[s] * query_sum, mask=inside)
        tl.store(here + 3 * S * H * W, weights[s] * products[S + s] + grad_logits[s] * products[s], mask=inside)

    weights = scaled(weights, rstds)
    grad_logits = scaled(grad_logits, rstds)
    outputs = (tl.zeros([BLOCK_W, BLOCK_D], tl.float32),) * D_TILES
    grads = outputs
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)[None, :]
        gamma = tl.load(norm_weight + c, mask=c < C, other=0.0).to(tl.float32)
        beta = tl.load(norm_bias + c, mask=c < C, other=0.0).to(tl.float32)
        sums = weighted_sums((weights, grad_logits), x, place, inside, w, c, means, C, SIDE)
        pooled = (sums[0] * gamma + beta).to(x.dtype.element_ty)
        grad_seen = (sums[1] * gamma).to(x.dtype.element_ty)
        outputs = project(outputs, pooled, wkv + C * C, head, c, C, D, BLOCK_D, PRECISION)
        grads = project(grads, grad_seen, wkv, head, c, C, D, BLOCK_D, PRECISION)
    store_head(outputs, heads, window, head, W, C, D, BLOCK_D)
    store_head(grads, grad_q, window, head, W, C, D, BLOCK_D)


@triton.jit(do_not_specialize=["W", "num_tiles", "share", "eps"])
def mean_gradient(grad, grad_input, mean, norm_weight, saved, grad_mean, token_means, partial, W, num_tiles, share, eps,
                  C: tl.constexpr, H: tl.constexpr, S: tl.constexpr, HEADS: tl.constexpr,
                  SUMS: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Gradient of each window's mean, from the residual and the query's norm, and that norm's affine gradients.

    Also sums over heads, ``token_means[2, S, W]``: the means over channels that the tokens' norm needs.
    """
    segment = tl.program_id(0)
    c = tl.arange(0, BLOCK_C)[None, :] + tl.zeros([ROWS, 1], tl.int32)
    k = tl.arange(0, SUMS)[None, :]
    head = tl.arange(0, HEADS)[None, None, :]
    weight = tl.load(norm_weight + c, mask=c < C, other=0.0).to(tl.float32)
    by_xhat = tl.zeros([ROWS, BLOCK_C], tl.float32)
    total = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for tile in range(segment * share, tl.minimum((segment + 1) * share, num_tiles)):
        window = tile * ROWS + tl.arange(0, ROWS)[:, None]
        known = (k < 2 * S) & (window < W)
        parts = saved + ((2 + k // S)[:, :, None] * H + head).to(tl.int64) * S * W + (k % S * W + window)[:, :, None]
        values = tl.load(parts, mask=(head < H) & known[:, :, None], other=0.0)
        tl.store(token_means + k * W + window, tl.sum(values, axis=2) / C, mask=known)
        inside = (window < W) & (c < C)
        here = window.to(tl.int64) * C + c
        values = tl.load(mean + here, mask=inside, other=0.0).to(tl.float32)
        mu, rstd = moments(values, c, C, eps)
        xhat = (values - mu) * rstd
        outer = tl.load(grad_input + here, mask=inside, other=0.0).to(tl.float32)
        by_xhat += outer * xhat
        total += outer
        outer *= weight
        first = tl.sum(outer, axis=1, keep_dims=True) / C
        second = tl.sum(outer * xhat, axis=1, keep_dims=True) / C
        residual = tl.load(grad + here, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_mean + here, residual + (outer - first - xhat * second) * rstd, mask=inside)
    c = tl.arange(0, BLOCK_C)[None, :]
    out = partial + segment.to(tl.int64) * 2 * C + c
    tl.store(out, tl.sum(by_xhat, axis=0, keep_dims=True), mask=c < C)
    tl.store(out + C, tl.sum(total, axis=0, keep_dims=True), mask=c < C)


@triton.jit(do_not_specialize=["w", "W"])
def token_gradient(x, places, norms, q, grad_heads, norm_weight, wkv, saved, token_means, grad_mean, grad_x, partial,
                   w, W, C: tl.constexpr, H: tl.constexpr, SIDE: tl.constexpr, PRECISION: tl.constexpr,
                   BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr):
    """A chunk of channels of the tokens' gradient, and ``partial[blocks, 2, C]`` of the affine of their norm."""
    D: tl.constexpr = C // H
    S: tl.constexpr = SIDE * SIDE
    C_TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    c = pid % C_TILES * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    window = pid // C_TILES * BLOCK_W + tl.arange(0, BLOCK_W)[:, None]
    inside = window < W
    total = tl.zeros([BLOCK_W, BLOCK_C], tl.float32)
    sums = (total,) * S
    for head in range(H):
        seen = tl.zeros([BLOCK_W, BLOCK_C], tl.float32)
        pooled = tl.zeros([BLOCK_W, BLOCK_C], tl.float32)
        for j in range((D + BLOCK_D - 1) // BLOCK_D):
            seen = tl.dot(head_rows(q, window, head, j, W, C, D, BLOCK_D),
                          weight_tile(wkv, head, j, c, C, D, BLOCK_D), seen, input_precision=PRECISION)
            pooled = tl.dot(head_rows(grad_heads, window, head, j, W, C, D, BLOCK_D),
                            weight_tile(wkv + C * C, head, j, c, C, D, BLOCK_D), pooled, input_precision=PRECISION)
        total += pooled  # weights sum to one, gradients of logits to zero
        for s in tl.static_range(S):
            here = saved + (head * S + s) * W + window
            weight = tl.load(here, mask=inside, other=0.0)
            grad_logit = tl.load(here + S * H * W, mask=inside, other=0.0)
            sums = replaced(sums, s, sums[s] + (weight * pooled + grad_logit * seen))

    place = tl.load(places + window, mask=inside, other=0)
    means = token_values(norms, window, W, S)
    rstds = token_values(norms + S * W, window, W, S)
    gamma = tl.load(norm_weight + c, mask=c < C, other=0.0).to(tl.float32)
    mask = inside & (c < C)
    shared = tl.load(grad_mean + window.to(tl.int64) * C + c, mask=mask, other=0.0) / S
    by_xhat = tl.zeros([BLOCK_W, BLOCK_C], tl.float32)
    for s in tl.static_range(S):
        token = centred(x, place, inside, s, w, c, means, C, SIDE)
        by_xhat += sums[s] * token
        first = tl.load(token_means + s * W + window, mask=inside, other=0.0)
        second = tl.load(token_means + (S + s) * W + window, mask=inside, other=0.0) * rstds[s]
        value = sums[s] * gamma - (first + token * second) * rstds[s] + shared
        here = grad_x + (place + s // SIDE * w + s % SIDE) * C + c
        tl.store(here, value.to(grad_x.dtype.element_ty), mask=mask)
    out = partial + pid // C_TILES * 2 * C + c
    tl.store(out, tl.sum(by_xhat, axis=0, keep_dims=True), mask=c < C)
    tl.store(out + C, tl.sum(total, axis=0, keep_dims=True), mask=c < C)


@triton.jit(do_not_specialize=["w", "W", "share"])
def weight_gradient(x, places, norms, q, grad_heads, norm_weight, norm_bias, saved, partial, w, W, share,
                    C: tl.constexpr, H: tl.constexpr, SIDE: tl.constexpr, PRECISION: tl.constexpr,
                    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr):
    """Sums over ``share`` windows of a tile of both gradients: ``partial[segment, 2C, C]``."""
    D: tl.constexpr = C // H
    D_TILES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    S: tl.constexpr = SIDE * SIDE
    C_TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    head = pid // D_TILES % H
    c = pid // D_TILES // H % C_TILES * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    segment = pid // D_TILES // H // C_TILES
    gamma = tl.load(norm_weight + c, mask=c < C, other=0.0).to(tl.float32)
    beta = tl.load(norm_bias + c, mask=c < C, other=0.0).to(tl.float32)
    keys = tl.zeros([BLOCK_D, BLOCK_C], tl.float32)
    values = tl.zeros([BLOCK_D, BLOCK_C], tl.float32)
    for first in range(segment * share, tl.minimum((segment + 1) * share, W), BLOCK_W):
        window = first + tl.arange(0, BLOCK_W)[:, None]
        inside = window < W
        place = tl.load(places + window, mask=inside, other=0)
        means = token_values(norms, window, W, S)
        weights = token_values(saved + head * S * W, window, W, S)
        grad_logits = token_values(saved + (H + head) * S * W, window, W, S)
        sums = weighted_sums((weights, grad_logits), x, place, inside, w, c, means, C, SIDE)
        pooled = (sums[0] * gamma + beta).to(x.dtype.element_ty)
        grad_seen = (sums[1] * gamma).to(x.dtype.element_ty)
        query = tl.trans(head_rows(q, window, head, pid % D_TILES, W, C, D, BLOCK_D))
        outer = tl.trans(head_rows(grad_heads, window, head, pid % D_TILES, W, C, D, BLOCK_D))
        keys = tl.dot(query, grad_seen, keys, input_precision=PRECISION)
        values = tl.dot(outer, pooled, values, input_precision=PRECISION)
    d = pid % D_TILES * BLOCK_D + tl.arange(0, BLOCK_D)[:, None]
    out = partial + segment.to(tl.int64) * 2 * C * C + (head * D + d) * C + c
    tl.store(out, keys, mask=(d < D) & (c < C))
    tl.store(out + C * C, values, mask=(d < D) & (c < C))


class Attention(NamedTuple):
    heads: Tensor  # [W, C]: the heads' outputs
    grad_q: Tensor  # [W, C]
    saved: Tensor  # float32 [4, H, S, W], see attend_gradient


class Means(NamedTuple):
    """Gradients of the windows' means, in float32."""

    grad: Tensor  # [W, C]
    token_means: Tensor  # [2, S, W]
    q_norm_weight: Tensor  # [C]
    q_norm_bias: Tensor


def token_tile(dtype: torch.dtype, D: int, S: int) -> Tile:
    """As many channels as leave room for a sum a token of the window: nine of them spill at 32 on sm_80."""
    if dtype == torch.float32:
        return Tile(block_w=32, block_c=32, block_d=16)
    block_d = min(head_block(D, dtype), 64 if D <= 128 else 32)
    return Tile(block_w=64, block_c=32 if S <= 4 else 16, block_d=block_d, threads=256)


def product_tile(dtype: torch.dtype, D: int) -> Tile:
    if dtype == torch.float32:
        return Tile(block_w=16, block_c=32, block_d=min(max(next_power_of_2(D), 16), 64))
    return Tile(block_w=32, block_c=32, block_d=128 if D > 64 else 64, threads=256)


def attention_gradients(x: Tensor, found: Windows, q: Tensor, grad_heads: Tensor, norm_weight: Tensor,
                        norm_bias: Tensor, wkv: Tensor, num_heads: int, window: int, scale: float) -> Attention:
    W, C = q.shape
    default = attend_tile(x.dtype, C // num_heads)
    if x.dtype != torch.float32 and window > 2:  # nine tokens' products spill at 32 channels with Triton 3.6
        default = replace(default, block_c=16)
    config = choose(ATTEND_GRADIENT, default, x, C=C, heads=num_heads, window=window)
    made = Attention(torch.empty_like(q), torch.empty_like(q),
                     torch.empty(4, num_heads, window**2, W, dtype=torch.float32, device=x.device))
    launch(attend_gradient, cdiv(W, config.block_w) * num_heads, config, x=x, places=found.places,
           norms=found.norms, q=q, grad_heads=grad_heads, norm_weight=norm_weight, norm_bias=norm_bias, wkv=wkv,
           **made._asdict(), w=x.shape[2], W=W, scale=scale, C=C, H=num_heads, SIDE=window,
           PRECISION=input_precision(x.dtype))
    return made


def mean_gradients(grad: Tensor, grad_input: Tensor, found: Windows, norm_weight: Tensor, seen: Attention,
                   eps: float) -> Means:
    (W, C), (_, H, S, _) = grad.shape, seen.saved.shape
    config = choose(MEAN_GRADIENT, row_tile(C), grad, C=C, heads=H)
    num_tiles = cdiv(W, config.rows)
    share = cdiv(num_tiles, MEAN_SEGMENTS)
    segments = cdiv(num_tiles, share)
    grad_mean = torch.empty(W, C, dtype=torch.float32, device=grad.device)
    token_means = torch.empty(2, S, W, dtype=torch.float32, device=grad.device)
    partial = torch.empty(segments, 2, C, dtype=torch.float32, device=grad.device)
    launch(mean_gradient, segments, config, grad=grad, grad_input=grad_input, mean=found.mean, norm_weight=norm_weight,
           saved=seen.saved, grad_mean=grad_mean, token_means=token_means, partial=partial, W=W, num_tiles=num_tiles,
           share=share, eps=eps, C=C, H=H, S=S, HEADS=next_power_of_2(H),
           SUMS=next_power_of_2(2 * S))
    return Means(grad_mean, token_means, *partial.sum(0))


def token_gradients(x: Tensor, found: Windows, q: Tensor, grad_heads: Tensor, norm_weight: Tensor, wkv: Tensor,
                    seen: Attention, means: Means, num_heads: int, window: int) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens' gradient, and in float32 those of their norm's weight and bias."""
    W, C = q.shape
    config = choose(TOKEN_GRADIENT, token_tile(x.dtype, C // num_heads, window**2), x, C=C, heads=num_heads,
                    window=window)
    grad_x = torch.empty_like(x)
    if W * window**2 * C < x.numel():  # tokens in no window
        grad_x.zero_()
    blocks = cdiv(W, config.block_w)
    partial = torch.empty(blocks, 2, C, dtype=torch.float32, device=x.device)
    launch(token_gradient, blocks * cdiv(C, config.block_c), config, x=x, places=found.places,
           norms=found.norms, q=q, grad_heads=grad_heads, norm_weight=norm_weight, wkv=wkv, saved=seen.saved,
           token_means=means.token_means, grad_mean=means.grad, grad_x=grad_x, partial=partial, w=x.shape[2], W=W, C=C,
           H=num_heads, SIDE=window, PRECISION=input_precision(x.dtype))
    return grad_x, *partial.sum(0)


def weight_gradients(x: Tensor, found: Windows, q: Tensor, grad_heads: Tensor, norm_weight: Tensor, norm_bias: Tensor,
                     seen: Attention, num_heads: int, window: int) -> Tensor:
    """The gradient of ``wkv`` in float32."""
    W, C = q.shape
    D = C // num_heads
    config = choose(WEIGHT_GRADIENT, product_tile(x.dtype, D), x, C=C, heads=num_heads, window=window)
    blocks = cdiv(W, config.block_w)
    share = cdiv(blocks, SEGMENTS) * config.block_w
    segments = cdiv(W, share)
    partial = torch.empty(segments, 2 * C, C, dtype=torch.float32, device=x.device)
    grid = segments * num_heads * cdiv(D, config.block_d) * cdiv(C, config.block_c)
    launch(weight_gradient, grid, config, x=x, places=found.places, norms=found.norms, q=q, grad_heads=grad_heads,
           norm_weight=norm_weight, norm_bias=norm_bias, saved=seen.saved, partial=partial, w=x.shape[2], W=W,
           share=share, C=C, H=num_heads, SIDE=window, PRECISION=input_precision(x.dtype))
    return partial.sum(0)
