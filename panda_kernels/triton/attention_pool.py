"""placeholder docstring."""
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Config, launch
from ._precision import input_precision


LENGTH = 256  # tokens of a program in the last pass of the gradients


@dataclass(frozen=True, kw_only=True)
class Tile(Config):
    block_l: int
    block_c: int


@dataclass(frozen=True, kw_only=True)
class Join(Config):
    block_s: int
    block_c: int


def tile(x: Tensor, block_l: int) -> Tile:
    return Tile(block_l=block_l, block_c=256 // x.element_size(), threads=256, num_stages=3)


@triton.jit
def _slots(cu_seqlens, sample, N, LENGTH: tl.constexpr):
    """First slot and number of slots of a sample whose tokens are cut into pieces of ``LENGTH``.

    Packed samples leave gaps, so that both follow from the sample's own offsets: from one sample to the next,
    ``offset // LENGTH + sample`` rises by no less than the pieces needed.
    """
    if cu_seqlens is None:
        count = tl.cdiv(N, LENGTH)
        first = sample * count
    else:
        begin = tl.load(cu_seqlens + sample)
        first = begin // LENGTH + sample
        count = tl.cdiv(tl.load(cu_seqlens + sample + 1) - begin, LENGTH)
    return first, count


@triton.jit
def _piece(cu_seqlens, slot, S, N, LENGTH: tl.constexpr):
    """Sample of a slot, its first token and the token after its last: none in a slot that no sample uses."""
    if cu_seqlens is None:
        count = tl.cdiv(N, LENGTH)
        sample = slot // count
        start = sample.to(tl.int64) * N
        end = start + N
        begin = start + slot % count * LENGTH
    else:
        sample = -1
        for s0 in range(0, S, 128):
            s = s0 + tl.arange(0, 128)
            first = tl.load(cu_seqlens + s, mask=s < S, other=0) // LENGTH + s
            sample += tl.sum(tl.where((s < S) & (first <= slot), 1, 0))
        start = tl.load(cu_seqlens + sample).to(tl.int64)
        end = tl.load(cu_seqlens + sample + 1).to(tl.int64)
        begin = start + (slot - start // LENGTH - sample) * LENGTH
    return sample, begin, tl.minimum(begin + LENGTH, end)


@triton.jit
def _split(weights, column, H: tl.constexpr, dtype: tl.constexpr):
    """Rounded weights in the first ``H`` columns, what rounding took from them in the others."""
    rounded = weights.to(dtype)
    return tl.where(column < H, rounded, (weights - rounded.to(tl.float32)).to(dtype))


@triton.jit
def _fold(sums, H: tl.constexpr):
    """Columns of rounded weights and of what rounding took from them, added: ``[..., H]``."""
    return tl.sum(tl.reshape(sums, [sums.shape[0], sums.shape[1] // H, H]), axis=1)


@triton.jit
def _rows(vectors, row, c, n, C: tl.constexpr):
    """``[row, c]`` of ``vectors[n, C]``, zero beyond either."""
    return tl.load(vectors + row * C + c, mask=(row < n) & (c < C), other=0.0)


@triton.jit
def _scan(x, token, end, a, b, row, n, eps, C: tl.constexpr, PRECISION: tl.constexpr, BLOCK_C: tl.constexpr):
    """One reading of tokens: mean, 1 / deviation, products of ``xhat`` with the rows of ``a`` and ``b``, sums of rows.

    The sums are taken about the token's first channel, which is within sqrt(C) deviations of the mean, so that squares
    of tokens far from zero do not cancel.
    """
    tokens = x + token * C
    inside = token < end
    shift = tl.load(tokens, mask=inside, other=0.0).to(tl.float32)
    sums = tl.zeros_like(shift)
    squares = tl.zeros_like(shift)
    product_a = tl.zeros([token.shape[0], row.shape[0]], tl.float32)
    product_b = product_a
    sums_a = tl.zeros([row.shape[0], BLOCK_C], tl.float32)
    sums_b = sums_a
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)[None, :]
        values = tl.load(tokens + c, mask=inside & (c < C), other=0.0)
        rows_a = _rows(a, row, c, n, C)
        product_a = tl.dot(values, tl.trans(rows_a), product_a, input_precision=PRECISION)
        sums_a += rows_a.to(tl.float32)
        if b is not None:
            rows_b = _rows(b, row, c, n, C)
            product_b = tl.dot(values, tl.trans(rows_b), product_b, input_precision=PRECISION)
            sums_b += rows_b.to(tl.float32)
        distance = tl.where(c < C, values.to(tl.float32) - shift, 0.0)
        sums += tl.sum(distance, axis=1, keep_dims=True)
        squares += tl.sum(distance * distance, axis=1, keep_dims=True)
    mean = shift + sums / C
    variance = squares / C - (sums / C) * (sums / C)
    rstd = 1.0 / tl.sqrt_rn(tl.where(variance < 0.0, 0.0, variance) + eps)  # tl.maximum would lose a NaN
    total_a = tl.trans(tl.sum(sums_a, axis=1, keep_dims=True))
    total_b = tl.trans(tl.sum(sums_b, axis=1, keep_dims=True))
    return (mean, rstd, (product_a - mean * total_a) * rstd, (product_b - mean * total_b) * rstd, total_a, total_b)


@triton.jit(do_not_specialize=["S", "N", "eps"])
def pool_pieces(x, queries, cu_seqlens, values, state, S, N, eps, n: tl.constexpr, C: tl.constexpr, H: tl.constexpr,
                COLUMNS: tl.constexpr, PER_SAMPLE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_L: tl.constexpr,
                BLOCK_C: tl.constexpr):
    """A piece's ``values[slot, n, C]``, relative to its largest logits and sums of weights, ``state[slot, 2, n]``."""
    slot = tl.program_id(0)
    sample, begin, end = _piece(cu_seqlens, slot, S, N, BLOCK_L)
    if begin >= end:
        return
    if PER_SAMPLE:
        queries += sample.to(tl.int64) * n * C
    token = begin + tl.arange(0, BLOCK_L)[:, None]
    inside = token < end
    column = tl.arange(0, COLUMNS)[None, :]
    row = tl.arange(0, COLUMNS)[:, None] % H
    mean, rstd, logits, _, _, _ = _scan(x, token, end, queries, None, row, n, eps, C, PRECISION, BLOCK_C)
    logits = tl.where(inside, logits, float("-inf"))
    peak = tl.max(logits, axis=0, keep_dims=True)
    weights = tl.exp(logits - peak)
    here = state + slot.to(tl.int64) * 2 * n + column
    tl.store(here, peak, mask=column < n)
    tl.store(here + n, tl.sum(weights, axis=0, keep_dims=True), mask=column < n)

    weights = _split(tl.where(inside, weights * rstd, 0.0), column, H, x.dtype.element_ty)
    # From the weights as they were rounded: what a token's mean adds then cancels to the last bit.
    offset = tl.sum(weights.to(tl.float32) * mean, axis=0, keep_dims=True)
    head = tl.arange(0, H)[None, :]
    here = values + (slot.to(tl.int64) * n + head) * C
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        again = tl.load(x + token * C + c[None, :], mask=inside & (c[None, :] < C), other=0.0)
        pooled = tl.dot(tl.trans(again), weights, input_precision=PRECISION) - offset
        tl.store(here + c[:, None], _fold(pooled, H), mask=(head < n) & (c[:, None] < C))


@triton.jit(do_not_specialize=["N"])
def combine(values, state, cu_seqlens, out, N, n: tl.constexpr, C: tl.constexpr, LENGTH: tl.constexpr, BLOCK_S: tl.constexpr,
            BLOCK_C: tl.constexpr):
    """Sum of ``values[slot, n, C]`` over each sample's slots, softmaxes joined by ``state``: ``out[sample, n, C]``."""
    pid = tl.program_id(0)
    C_TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    c = pid % C_TILES * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    head = pid // C_TILES % n
    sample = pid // C_TILES // n
    first, count = _slots(cu_seqlens, sample, N, LENGTH)
    own = tl.arange(0, BLOCK_S)
    sums = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    norms = tl.zeros([BLOCK_S], tl.float32)
    peak = float("-inf")
    for i in range(0, count, BLOCK_S):
        slot = (first + i + own).to(tl.int64)
        inside = i + own < count
        found = tl.load(values + (slot * n + head)[:, None] * C + c, mask=inside[:, None] & (c < C), other=0.0)
        if state is not None:
            peaks = tl.load(state + slot * 2 * n + head, mask=inside, other=float("-inf"))
            higher = tl.maximum(peak, tl.max(peaks, axis=0))
            weight = tl.exp(peaks - higher)
            norms = norms * tl.exp(peak - higher) + weight * tl.load(state + slot * 2 * n + n + head, mask=inside,
                                                                     other=0.0)
            sums = sums * tl.exp(peak - higher) + weight[:, None] * found
            peak = higher
        else:
            sums += found
    total = tl.sum(sums, axis=0, keep_dims=True)
    if state is not None:
        total = tl.where(count > 0, total / tl.sum(norms, axis=0), 0.0)
    tl.store(out + (sample.to(tl.int64) * n + head) * C + c, total.to(out.dtype.element_ty), mask=c < C)


@triton.jit(do_not_specialize=["S", "N", "eps"])
def score_pieces(x, queries, grad, cu_seqlens, moments, scores, state, S, N, eps, n: tl.constexpr, C: tl.constexpr,
                 H: tl.constexpr, COLUMNS: tl.constexpr, PER_SAMPLE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_L: tl.constexpr,
                 BLOCK_C: tl.constexpr):
    """What the gradients need of each token: ``moments[token, 2]`` and ``scores[token, 2, n]``, logits and ``G(P)``.

    ``state[slot, 5, n]``: largest logit, sum of weights, weighted sum of ``G(P)``, sums of the query and of ``grad``.
    """
    slot = tl.program_id(0)
    sample, begin, end = _piece(cu_seqlens, slot, S, N, BLOCK_L)
    if begin >= end:
        return
    grad += sample.to(tl.int64) * n * C
    if PER_SAMPLE:
        queries += sample.to(tl.int64) * n * C
    token = begin + tl.arange(0, BLOCK_L)[:, None]
    inside = token < end
    column = tl.arange(0, COLUMNS)[None, :]
    row = tl.arange(0, COLUMNS)[:, None]
    mean, rstd, logits, grads, sums, grad_sums = _scan(x, token, end, queries, grad, row, n, eps, C, PRECISION,
                                                       BLOCK_C)
    tl.store(moments + 2 * token, mean, mask=inside)
    tl.store(moments + 2 * token + 1, rstd, mask=inside)
    here = scores + token * 2 * n + column
    tl.store(here, logits, mask=inside & (column < n))
    tl.store(here + n, grads, mask=inside & (column < n))
    logits = tl.where(inside, logits, float("-inf"))
    peak = tl.max(logits, axis=0, keep_dims=True)
    weights = tl.exp(logits - peak)
    weighted = tl.where(inside, weights * grads, 0.0)
    here = state + slot.to(tl.int64) * 5 * n + column
    tl.store(here, peak, mask=column < n)
    tl.store(here + n, tl.sum(weights, axis=0, keep_dims=True), mask=column < n)
    tl.store(here + 2 * n, tl.sum(weighted, axis=0, keep_dims=True), mask=column < n)
    tl.store(here + 3 * n, sums, mask=column < n)
    tl.store(here + 4 * n, grad_sums, mask=column < n)


@triton.jit
def _softmax(state, first, count, head, n, BLOCK_S: tl.constexpr):
    """A sample's logarithm of the sum of weights, and its weighted mean of ``G(P)``, for each of the columns."""
    own = tl.arange(0, BLOCK_S)[:, None]
    norms = tl.zeros([BLOCK_S, head.shape[1]], tl.float32)
    sums = norms
    peak = tl.full([1, head.shape[1]], float("-inf"), tl.float32)
    for i in range(0, count, BLOCK_S):
        here = state + (first + i + own).to(tl.int64) * 5 * n + head
        inside = (i + own < count) & (head < n)
        peaks = tl.load(here, mask=inside, other=float("-inf"))
        higher = tl.maximum(peak, tl.max(peaks, axis=0, keep_dims=True))
        weight = tl.exp(peaks - higher)
        norms = norms * tl.exp(peak - higher) + weight * tl.load(here + n, mask=inside, other=0.0)
        sums = sums * tl.exp(peak - higher) + weight * tl.load(here + 2 * n, mask=inside, other=0.0)
        peak = higher
    norm = tl.sum(norms, axis=0, keep_dims=True)
    mean = tl.sum(sums, axis=0, keep_dims=True) / norm
    return tl.where(head < n, peak + tl.log(norm), 0.0), tl.where(head < n, mean, 0.0)


@triton.jit(do_not_specialize=["S", "N"])
def gradients(x, queries, grad, cu_seqlens, moments, scores, state, grad_x, partial, S, N, n: tl.constexpr, C: tl.constexpr,
              H: tl.constexpr, COLUMNS: tl.constexpr, PER_SAMPLE: tl.constexpr, PRECISION: tl.constexpr,
              PIECE: tl.constexpr, LENGTH: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr):
    """A block of channels of ``LENGTH`` tokens: ``grad_x`` and their part of the queries', ``partial[slot, n, C]``."""
    pid = tl.program_id(0)
    C_TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    slot = pid // C_TILES
    sample, begin, end = _piece(cu_seqlens, slot, S, N, LENGTH)
    if begin >= end:
        return
    first, count = _slots(cu_seqlens, sample, N, PIECE)
    column = tl.arange(0, COLUMNS)[None, :]
    head = column % H
    norm, mean_grad = _softmax(state, first, count, head, n, BLOCK_S=64)
    here = state + first.to(tl.int64) * 5 * n + column
    mean_query = tl.load(here + 3 * n, mask=column < n, other=0.0) / C
    mean_outer = tl.load(here + 4 * n, mask=column < n, other=0.0) / C

    c0 = pid % C_TILES * BLOCK_C
    c = c0 + tl.arange(0, BLOCK_C)[None, :]
    row = tl.arange(0, COLUMNS)[:, None] % H
    of_sample = sample.to(tl.int64) * n * C
    outer = _rows(grad + of_sample, row, c, n, C)
    query = _rows(queries + of_sample if PER_SAMPLE else queries, row, c, n, C)
    sums = tl.zeros([BLOCK_C, COLUMNS], tl.float32)
    offset = tl.zeros([1, COLUMNS], tl.float32)
    for start in range(0, (end - begin).to(tl.int32), BLOCK_L):
        token = begin + start + tl.arange(0, BLOCK_L)[:, None]
        inside = token < end
        values = tl.load(x + token * C + c, mask=inside & (c < C), other=0.0)
        mean = tl.load(moments + 2 * token, mask=inside, other=0.0)
        rstd = tl.load(moments + 2 * token + 1, mask=inside, other=0.0)
        score = scores + token * 2 * n + head
        present = inside & (head < n)
        logits = tl.load(score, mask=present, other=0.0)
        grads = tl.load(score + n, mask=present, other=0.0)
        weights = tl.where(present, tl.exp(logits - norm), 0.0)
        grad_logits = weights * (grads - mean_grad)
        scaled = _split(grad_logits * rstd, column, H, x.dtype.element_ty)
        if grad_x is not None:
            mean_g = tl.sum(weights * mean_outer + grad_logits * mean_query, axis=1, keep_dims=True)
            products = tl.where(column < n, weights * grads + grad_logits * logits, 0.0)
            slope = -rstd * rstd * tl.sum(products, axis=1, keep_dims=True) / C
            constant = -rstd * mean_g - slope * mean
            pooled = _split(weights * rstd, column, H, x.dtype.element_ty)
            g = tl.dot(pooled, outer, input_precision=PRECISION) + tl.dot(scaled, query, input_precision=PRECISION)
            g += values.to(tl.float32) * slope + constant
            tl.store(grad_x + token * C + c, g.to(x.dtype.element_ty), mask=inside & (c < C))
        if partial is not None:
            offset += tl.sum(scaled.to(tl.float32) * mean, axis=0, keep_dims=True)
            sums = tl.dot(tl.trans(values), scaled, sums, input_precision=PRECISION)
    if partial is not None:
        out_head = tl.arange(0, H)[None, :]
        out_c = c0 + tl.arange(0, BLOCK_C)[:, None]
        out = partial + (slot.to(tl.int64) * n + out_head) * C + out_c
        tl.store(out, _fold(sums - offset, H), mask=(out_head < n) & (out_c < C))


def _sizes(x: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int]:
    """Samples, and the tokens of each where they all have the same number."""
    return x.shape[:2] if cu_seqlens is None else (cu_seqlens.shape[0] - 1, 0)


def _num_slots(x: Tensor, cu_seqlens: Tensor | None, length: int) -> int:
    S, N = _sizes(x, cu_seqlens)
    return S * triton.cdiv(N, length) if cu_seqlens is None else x.shape[0] // length + S


def _reduced(values: Tensor, state: Tensor | None, cu_seqlens: Tensor | None, sizes: tuple[int, int], length: int,
             dtype: torch.dtype) -> Tensor:
    S, N = sizes
    _, n, C = values.shape
    config = Join(block_s=128, block_c=32)
    out = torch.empty(S, n, C, dtype=dtype, device=values.device)
    launch(combine, S * n * triton.cdiv(C, config.block_c), config, values=values, state=state, cu_seqlens=cu_seqlens,
           out=out, N=N, n=n, C=C, LENGTH=length)
    return out


def _constants(x: Tensor, queries: Tensor, *, split: bool) -> dict[str, object]:
    """What the kernels take from shapes and dtypes alone; ``split``: two columns for a query."""
    n, H = queries.shape[-2], max(8, triton.next_power_of_2(queries.shape[-2]))
    return {"n": n, "C": x.shape[-1], "H": H, "COLUMNS": 2 * H if split else H, "PER_SAMPLE": queries.ndim == 3,
            "PRECISION": input_precision(x.dtype)}


def pool(x: Tensor, queries: Tensor, cu_seqlens: Tensor | None, eps: float) -> Tensor:
    """``[S, n, C]`` from contiguous ``x``, ``[S, N, C]`` or packed ``[total, C]``, and ``queries``."""
    config, sizes = tile(x, 32), _sizes(x, cu_seqlens)
    slots, n = _num_slots(x, cu_seqlens, config.block_l), queries.shape[-2]
    values = torch.empty(slots, n, x.shape[-1], dtype=torch.float32, device=x.device)
    state = torch.empty(slots, 2, n, dtype=torch.float32, device=x.device)
    launch(pool_pieces, slots, config, x=x, queries=queries, cu_seqlens=cu_seqlens, values=values, state=state,
           S=sizes[0], N=sizes[1], eps=eps, **_constants(x, queries, split=x.element_size() == 2))
    return _reduced(values, state, cu_seqlens, sizes, config.block_l, x.dtype)


def pool_gradients(grad: Tensor, x: Tensor, queries: Tensor, cu_seqlens: Tensor | None, eps: float,
                   needs: list[bool]) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of ``x`` and ``queries``, as far as needed, from contiguous tensors; ``grad`` is ``[S, n, C]``."""
    config, sizes, C = tile(x, 64), _sizes(x, cu_seqlens), x.shape[-1]
    tokens, slots, n = x.numel() // C, _num_slots(x, cu_seqlens, config.block_l), queries.shape[-2]
    moments = torch.empty(tokens, 2, dtype=torch.float32, device=x.device)
    scores = torch.empty(tokens, 2, n, dtype=torch.float32, device=x.device)
    state = torch.empty(slots, 5, n, dtype=torch.float32, device=x.device)
    shared = {"x": x, "queries": queries, "grad": grad, "cu_seqlens": cu_seqlens, "moments": moments,
              "scores": scores, "state": state, "S": sizes[0], "N": sizes[1]}
    launch(score_pieces, slots, config, eps=eps, **shared, **_constants(x, queries, split=x.element_size() == 2))
    pieces = _num_slots(x, cu_seqlens, LENGTH)
    grad_x = torch.empty_like(x) if needs[0] else None
    partial = torch.empty(pieces, n, C, dtype=torch.float32, device=x.device) if needs[1] else None
    launch(gradients, pieces * triton.cdiv(C, config.block_c), config, grad_x=grad_x, partial=partial,
           PIECE=config.block_l, LENGTH=LENGTH, **shared, **_constants(x, queries, split=True))
    if partial is None:
        return grad_x, None
    grad_queries = _reduced(partial, None, cu_seqlens, sizes, LENGTH, torch.float32)
    return grad_x, (grad_queries if queries.ndim == 3 else grad_queries.sum(0)).to(queries.dtype)
