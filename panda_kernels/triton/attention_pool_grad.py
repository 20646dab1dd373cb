"""Gradients of attention pooling, which recompute what the forward pass knew.

The floor is two readings of the tokens, as every gradient needs sums over all of its sample, and one writing. In
:func:`score_pieces` a program reads a piece once and keeps 18 floats a token, with eight queries: mean, 1 / deviation,
logits and ``G(P)``. In :func:`gradients` a program takes a block of channels of 256 tokens, writes their gradient and
sums the queries', so that few partial sums are left to join. LayerNorm's means over channels are sums of scalars a
query, ``mean(G(xhat) xhat) = sum_h (P_h G(P)_h + G(L)_h L_h) / C``; what is left of it is ``slope * x + constant`` a
token.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuning import Space, choose
from ._launch import cdiv, launch
from .attention_pool import (
    Tile,
    combined,
    constants_of,
    fold,
    num_slots,
    piece_of,
    rows_of,
    scan,
    sizes_of,
    slots_of,
    split,
)

LENGTH = 256  # tokens of a program that writes gradients
TILES: dict[str, tuple[int, ...]] = {"block_l": (32, 64), "block_c": (32, 64, 128), "threads": (128, 256),
                                     "num_stages": (2, 3)}
SCORE_PIECES = Space("triton.attention_pool_grad.score_pieces", **TILES)
GRADIENTS = Space("triton.attention_pool_grad.gradients", **TILES)


@triton.jit(do_not_specialize=["S", "N", "eps"])
def score_pieces(x, queries, grad, cu_seqlens, moments, scores, state, S, N, eps, n: tl.constexpr, C: tl.constexpr,
                 H: tl.constexpr, COLUMNS: tl.constexpr, PER_SAMPLE: tl.constexpr, PRECISION: tl.constexpr,
                 BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr):
    """What the gradients need of each token: ``moments[token, 2]`` and ``scores[token, 2, H]``, logits and ``G(P)``.

    ``state[slot, 5, H]``: largest logit, sum of weights, weighted sum of ``G(P)``, sums of the query and of ``grad``.
    """
    slot = tl.program_id(0)
    sample, begin, end = piece_of(cu_seqlens, slot, S, N, BLOCK_L)
    if begin >= end:
        return
    grad += sample.to(tl.int64) * n * C
    if PER_SAMPLE:
        queries += sample.to(tl.int64) * n * C
    token = begin + tl.arange(0, BLOCK_L)[:, None]
    inside = token < end
    column = tl.arange(0, COLUMNS)[None, :]
    row = tl.arange(0, COLUMNS)[:, None]
    mean, rstd, logits, grads, sums, grad_sums = scan(x, token, end, queries, grad, row, n, eps, C, PRECISION,
                                                      BLOCK_C)
    tl.store(moments + 2 * token, mean, mask=inside)
    tl.store(moments + 2 * token + 1, rstd, mask=inside)
    here = scores + token * 2 * H + column
    tl.store(here, logits, mask=inside & (column < H))
    tl.store(here + H, grads, mask=inside & (column < H))
    logits = tl.where(inside, logits, float("-inf"))
    peak = tl.max(logits, axis=0, keep_dims=True)
    weights = tl.exp(logits - peak)
    weighted = tl.where(inside, weights * grads, 0.0)
    here = state + slot.to(tl.int64) * 5 * H + column
    tl.store(here, peak, mask=column < H)
    tl.store(here + H, tl.sum(weights, axis=0, keep_dims=True), mask=column < H)
    tl.store(here + 2 * H, tl.sum(weighted, axis=0, keep_dims=True), mask=column < H)
    tl.store(here + 3 * H, sums, mask=column < H)
    tl.store(here + 4 * H, grad_sums, mask=column < H)


@triton.jit
def _softmax(state, first, count, head, H: tl.constexpr, BLOCK_S: tl.constexpr):
    """A sample's logarithm of the sum of weights, and its weighted mean of ``G(P)``, for each of the columns."""
    own = tl.arange(0, BLOCK_S)[:, None]
    norms = tl.zeros([BLOCK_S, head.shape[1]], tl.float32)
    sums = norms
    peak = tl.full([1, head.shape[1]], float("-inf"), tl.float32)
    for i in range(0, count, BLOCK_S):
        here = state + (first + i + own).to(tl.int64) * 5 * H + head
        inside = i + own < count
        peaks = tl.load(here, mask=inside, other=float("-inf"))
        higher = tl.maximum(peak, tl.max(peaks, axis=0, keep_dims=True))
        weight = tl.exp(peaks - higher)
        norms = norms * tl.exp(peak - higher) + weight * tl.load(here + H, mask=inside, other=0.0)
        sums = sums * tl.exp(peak - higher) + weight * tl.load(here + 2 * H, mask=inside, other=0.0)
        peak = higher
    norm = tl.sum(norms, axis=0, keep_dims=True)
    return peak + tl.log(norm), tl.sum(sums, axis=0, keep_dims=True) / norm


@triton.jit(do_not_specialize=["S", "N"])
def gradients(x, queries, grad, cu_seqlens, moments, scores, state, grad_x, partial, S, N, n: tl.constexpr,
              C: tl.constexpr, H: tl.constexpr, COLUMNS: tl.constexpr, PER_SAMPLE: tl.constexpr,
              PRECISION: tl.constexpr, PIECE: tl.constexpr, LENGTH: tl.constexpr, BLOCK_L: tl.constexpr,
              BLOCK_C: tl.constexpr):
    """A block of channels of ``LENGTH`` tokens: ``grad_x`` and their part of the queries', ``partial[slot, n, C]``."""
    pid = tl.program_id(0)
    C_TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    slot = pid // C_TILES
    sample, begin, end = piece_of(cu_seqlens, slot, S, N, LENGTH)
    if begin >= end:
        return
    first, count = slots_of(cu_seqlens, sample, N, PIECE)
    column = tl.arange(0, COLUMNS)[None, :]
    head = column % H
    norm, mean_grad = _softmax(state, first, count, head, H, BLOCK_S=64)
    here = state + first.to(tl.int64) * 5 * H + column
    mean_query = tl.load(here + 3 * H, mask=column < H, other=0.0) / C
    mean_outer = tl.load(here + 4 * H, mask=column < H, other=0.0) / C

    c0 = pid % C_TILES * BLOCK_C
    c = c0 + tl.arange(0, BLOCK_C)[None, :]
    row = tl.arange(0, COLUMNS)[:, None] % H
    of_sample = sample.to(tl.int64) * n * C
    outer = rows_of(grad + of_sample, row, c, n, C)
    query = rows_of(queries + of_sample if PER_SAMPLE else queries, row, c, n, C)
    sums = tl.zeros([BLOCK_C, COLUMNS], tl.float32)
    offset = tl.zeros([1, COLUMNS], tl.float32)
    for start in range(0, (end - begin).to(tl.int32), BLOCK_L):
        token = begin + start + tl.arange(0, BLOCK_L)[:, None]
        inside = token < end
        values = tl.load(x + token * C + c, mask=inside & (c < C), other=0.0)
        mean = tl.load(moments + 2 * token, mask=inside, other=0.0)
        rstd = tl.load(moments + 2 * token + 1, mask=inside, other=0.0)
        score = scores + token * 2 * H + head
        logits = tl.load(score, mask=inside, other=0.0)
        grads = tl.load(score + H, mask=inside, other=0.0)
        weights = tl.where(inside, tl.exp(logits - norm), 0.0)
        grad_logits = weights * (grads - mean_grad)
        scaled, unit = split(grad_logits * rstd, column, H, x.dtype.element_ty)
        if grad_x is not None:
            mean_g = tl.sum(weights * mean_outer + grad_logits * mean_query, axis=1, keep_dims=True)
            products = tl.where(column < H, weights * grads + grad_logits * logits, 0.0)
            slope = -rstd * rstd * tl.sum(products, axis=1, keep_dims=True) / C
            constant = -rstd * mean_g - slope * mean
            pooled, pooled_unit = split(weights * rstd, column, H, x.dtype.element_ty)
            g = tl.dot(pooled, outer, input_precision=PRECISION) * pooled_unit
            g += tl.dot(scaled, query, input_precision=PRECISION) * unit
            g += values.to(tl.float32) * slope + constant
            tl.store(grad_x + token * C + c, g.to(x.dtype.element_ty), mask=inside & (c < C))
        if partial is not None:
            offset += tl.sum(scaled.to(tl.float32) * mean, axis=0, keep_dims=True) * unit
            sums += tl.dot(tl.trans(values), scaled, input_precision=PRECISION) * unit
    if partial is not None:
        out_head = tl.arange(0, H)[None, :]
        out_c = c0 + tl.arange(0, BLOCK_C)[:, None]
        out = partial + (slot.to(tl.int64) * n + out_head) * C + out_c
        tl.store(out, fold(sums - offset, H), mask=(out_head < n) & (out_c < C))


def gradient_tiles(dtype: torch.dtype, H: int) -> tuple[Tile, Tile]:
    """Of :func:`score_pieces` and :func:`gradients`. Wide products want 64 rows, sums without tensor cores fewer.

    More than eight queries would spill: they get fewer channels at a time, and more threads.
    """
    few = H == 8
    threads = 128 if few else 256
    if dtype == torch.float32:
        return Tile(block_l=32, block_c=64 if few else 32, num_stages=3), Tile(block_l=32, block_c=64, threads=threads)
    return (Tile(block_l=64, block_c=128 if few else 64, threads=256, num_stages=3),
            Tile(block_l=64, block_c=64, threads=threads))


def pool_gradients(grad: Tensor, x: Tensor, queries: Tensor, cu_seqlens: Tensor | None, eps: float,
                   needs: list[bool]) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of ``x`` and ``queries``, as far as needed, from contiguous tensors; ``grad`` is ``[S, n, C]``."""
    sizes, constants = sizes_of(x, cu_seqlens), constants_of(x, queries)
    n, C, H = constants["n"], constants["C"], constants["H"]
    score, config = (choose(space, tile, x, n=n, C=C)
                     for space, tile in zip((SCORE_PIECES, GRADIENTS), gradient_tiles(x.dtype, H), strict=True))
    slots, pieces = (num_slots(x, cu_seqlens, length) for length in (score.block_l, LENGTH))

    def workspace(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    tokens = x.numel() // C
    shared = {"x": x, "queries": queries, "grad": grad, "cu_seqlens": cu_seqlens, "moments": workspace(tokens, 2),
              "scores": workspace(tokens, 2, H), "state": workspace(slots, 5, H)} | sizes | constants
    launch(score_pieces, slots, score, eps=eps, **shared)
    grad_x = torch.empty_like(x) if needs[0] else None
    partial = workspace(pieces, n, C) if needs[1] else None
    launch(gradients, pieces * cdiv(C, config.block_c), config, grad_x=grad_x, partial=partial,
           PIECE=score.block_l, LENGTH=LENGTH, **shared | {"COLUMNS": 2 * H})
    if partial is None:
        return grad_x, None
    grad_queries = combined(partial, None, cu_seqlens, sizes, LENGTH, torch.float32)
    return grad_x, (grad_queries if queries.ndim == 3 else grad_queries.sum(0)).to(queries.dtype)
