"""The drivers of csrc/core in every tier this machine has, against float64, with NaN around all they are given.

``PANDA_SANITIZE=1``, with libasan preloaded, gives them memory that ends where it should instead.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import core_module
import numpy as np
import pytest
from core_module import POISON, Array, stored, widened

SANITIZED = bool(os.environ.get("PANDA_SANITIZE"))
CORE = core_module.load(sanitize=SANITIZED)
TIERS = core_module.supported_tiers(CORE)
GUARD = 0 if SANITIZED else 67  # elements; odd, so that nothing is aligned
EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-7}
LAYER_NORM_EPS = 1e-5


class Memory:
    """The arguments of one call, drawn at random in one dtype, each in a buffer of its own that is NaN elsewhere."""

    def __init__(self, dtype: str) -> None:
        self.dtype, self.random = dtype, np.random.default_rng(0)
        self.guarded: list[tuple[Array, Array]] = []

    def inside(self, x: Array, around: Any) -> Array:
        buffer = np.full(x.size + 2 * GUARD, around, x.dtype)
        inner = buffer[GUARD : GUARD + x.size].reshape(x.shape)
        inner[...] = x
        return inner

    def tokens(self, *shape: int) -> Array:
        return self.inside(stored(self.random.standard_normal(shape) + 0.3, self.dtype), POISON[self.dtype])

    def floats(self, *shape: int, scale: float = 1.0) -> Array:
        return self.inside(stored(scale * self.random.standard_normal(shape), "float32"), np.nan)

    def integers(self, values: Any) -> Array:
        return self.inside(np.array(values, np.int64), 2**60)

    def weight(self, n: int, k: int) -> tuple[Array, Array]:
        """Packed, and as it was."""
        packed, weights = self.weights(1, n, k)
        return packed, weights[0]

    def weights(self, matrices: int, n: int, k: int, *, transposed: bool = False) -> tuple[Array, Array]:
        """A stack [matrices, n, k], each packed or, ``transposed``, its transpose."""
        w = stored(self.random.standard_normal((matrices, n, k)) / math.sqrt(k), self.dtype)
        each = [CORE.pack(m.T if transposed else m, self.dtype == "bfloat16") for m in w]
        guard = 64 * bool(GUARD)  # packed weights are aligned
        buffer = CORE.aligned_bytes(sum(map(len, each)) + 2 * guard)
        buffer[:] = 255
        inner = buffer[guard : len(buffer) - guard]
        inner[:] = np.concatenate(each)
        return inner, exact(w)

    def repacked(self, w: Array) -> Array:
        """What :meth:`weights` gave, the other way round."""
        each = [CORE.pack(stored(m, self.dtype).T, self.dtype == "bfloat16") for m in w]
        packed = CORE.aligned_bytes(sum(map(len, each)))
        packed[:] = np.concatenate(each)
        return packed

    def result(self, *shape: int, dtype: str | None = None) -> Array:
        poison = POISON[dtype or self.dtype]
        buffer = np.full(math.prod(shape) + 2 * GUARD, poison)
        self.guarded.append((buffer, np.array(poison)))
        return buffer[GUARD : len(buffer) - GUARD].reshape(shape)

    def overrun(self) -> bool:
        ends = [(np.concatenate([b[:GUARD], b[len(b) - GUARD :]]), poison) for b, poison in self.guarded]
        return any(end.tobytes() != np.full_like(end, poison).tobytes() for end, poison in ends)


def exact(x: Array) -> Array:
    return widened(x).astype(np.float64)


def normalised(x: Array) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + LAYER_NORM_EPS)


def softmax(x: Array) -> Array:
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def convolved(x: Array, taps: Array, kernel: tuple[int, int, int]) -> Array:
    padded = np.pad(x, [(0, 0), *((k // 2, k // 2) for k in kernel), (0, 0)])
    t, h, w = x.shape[1:4]
    at = np.ndindex(*kernel)
    return sum(padded[:, i : i + t, j : j + h, k : k + w] * tap for tap, (i, j, k) in zip(taps, at, strict=True))


Pair = tuple[Array, Array]
Pairs = dict[str, Pair]


def depthwise_conv3d(memory: Memory, shape: tuple[int, ...], kernel: tuple[int, int, int] = (3, 3, 3),
                     bias: bool = True) -> Pair:
    x, y, c = memory.tokens(*shape), memory.result(*shape), shape[-1]
    taps, added = memory.floats(math.prod(kernel), c), memory.floats(c) if bias else None
    CORE.depthwise_conv3d(x, taps, added, *kernel, y)
    return y, convolved(exact(x), exact(taps), kernel) + (0 if added is None else exact(added))


def patch_embed(memory: Memory, shape: tuple[int, ...], patch: int, c: int, pixels: str = "float32",
                missing: int = 0, bias: bool = False) -> Pair:
    """``shape`` is B, T, H, W; a fourth plane, what is beyond the last patch, and missing frames are NaN."""
    b, t, height, width = shape
    h, w, k = height // patch, width // patch, 3 * patch * patch
    if pixels == "uint8":
        decoded = memory.random.integers(0, 256, (b, t, height, width, 3), dtype=np.uint8)
        x = np.moveaxis(memory.inside(decoded, 255), -1, 2)
    else:
        x = memory.inside(stored(memory.random.standard_normal((b, t, 4, height, width)), pixels), POISON[pixels])
        x[:, :, 3] = x[..., h * patch :, :] = x[..., w * patch :] = POISON[pixels]
    present = memory.inside(np.arange(b * t).reshape(b, t) < b * t - missing, True)
    if pixels != "uint8":
        x[~present] = POISON[pixels]
    normalise, (packed, weight) = memory.floats(6, scale=0.01), memory.weight(c, k)
    y, added = memory.result(b, t, h, w, c), memory.floats(c) if bias else None
    CORE.patch_embed(x, present if missing else None, normalise, patch, packed, added, y)
    values = x[:, :, :3, : h * patch, : w * patch]
    scale, shift = exact(normalise).reshape(2, 3, 1, 1)
    values = values * scale + shift if pixels == "uint8" else exact(values)
    values = np.where(present[:, :, None, None, None], values, 0).reshape(b, t, 3, h, patch, w, patch)
    product = values.transpose(0, 1, 3, 5, 2, 4, 6).reshape(b, t, h, w, k) @ weight.T
    return y, product + (0 if added is None else exact(added))


def local_encoding(memory: Memory, shape: tuple[int, ...], r: int) -> Pair:
    x, y, c = memory.tokens(*shape), memory.result(*shape), shape[-1]
    (squeeze, w1), b1, time, bt = memory.weight(r, c), memory.floats(r), memory.floats(3, r), memory.floats(r)
    (expand, w2), b2, taps, bd = memory.weight(c, r), memory.floats(c), memory.floats(27, c), memory.floats(c)
    CORE.local_encoding(x, [squeeze, b1, time, bt, expand, b2, taps, bd], r, y)
    mixed = convolved(exact(x) @ w1.T + exact(b1), exact(time), (3, 1, 1)) + exact(bt)
    return y, convolved(exact(x) + mixed @ w2.T + exact(b2), exact(taps), (3, 3, 3)) + exact(bd)


def attention_pool(memory: Memory, lengths: tuple[int, ...], c: int, n: int, shared: bool = True) -> Pair:
    offsets, samples = memory.integers([0, *accumulate(lengths)]), len(lengths)
    x, z = memory.tokens(sum(lengths), c), memory.result(samples, n, c, dtype="float32")
    queries = memory.floats(*([] if shared else [samples]), n, c, scale=2 / math.sqrt(c))
    CORE.attention_pool(x, queries, offsets, LAYER_NORM_EPS, z)
    pooled = np.zeros(z.shape)
    for s, u in enumerate(np.broadcast_to(exact(queries), z.shape)):
        xhat = normalised(exact(x[offsets[s] : offsets[s + 1]]))
        if len(xhat):
            pooled[s] = softmax(u @ xhat.T) @ xhat
    return z, pooled


def windows_of(frame: Array, corners: tuple[int, ...], window: int) -> Array:
    """[windows, tokens of one, c] of a frame's rectangle."""
    row0, row1, col0, col1 = corners
    rows, cols = (row1 - row0) // window, (col1 - col0) // window
    whole = frame[row0 : row0 + rows * window, col0 : col0 + cols * window]
    cut = whole.reshape(rows, window, cols, window, -1).transpose(0, 2, 1, 3, 4)
    return cut.reshape(rows * cols, window * window, -1)


def sum_of_tokens(memory: Memory, shape: tuple[int, ...], summed: bool) -> tuple[Array, Array | None, Array]:
    """x, what is added to it, and the tokens exactly."""
    x, added = memory.tokens(*shape), memory.tokens(*shape) if summed else None
    return x, added, exact(x) if added is None else exact(x) + exact(added)


def window_attention_pool(memory: Memory, grid: tuple[int, int], corners: tuple[tuple[int, ...], ...], c: int,
                          heads: int, window: int, summed: bool = False) -> Pair:
    width = c // heads
    (query, wq), bq, (out, wp), bp = memory.weight(c, c), memory.floats(c), memory.weight(c, c), memory.floats(c)
    keys, wk = memory.weights(heads, width, c, transposed=True)
    values, wv = memory.weights(heads, width, c)
    x, added, whole = sum_of_tokens(memory, (len(corners), *grid, c), summed)
    tokens = np.concatenate([windows_of(frame, r, window) for frame, r in zip(whole, corners, strict=True)])
    y = memory.result(len(tokens), c)
    CORE.window_attention_pool(x, added, memory.integers(corners), [query, bq, keys, values, out, bp], heads, window,
                               LAYER_NORM_EPS, y)
    mean, xhat = tokens.mean(1), normalised(tokens)
    q = (normalised(mean) @ wq.T + exact(bq)).reshape(-1, heads, width)
    weights = softmax(np.einsum("mhd,hdc,mjc->mhj", q, wk, xhat))
    attended = np.einsum("mhj,mjc,hdc->mhd", weights, xhat, wv).reshape(-1, c)
    return y, mean + attended @ wp.T + exact(bp)


def assemble_tokens(memory: Memory, corners: tuple[tuple[int, ...], ...], c: int, window: int) -> Pair:
    sides = [((r1 - r0) // window, (c1 - c0) // window) for r0, r1, c0, c1 in corners]
    y, f, split = memory.tokens(sum(h * w for h, w in sides), c), memory.tokens(len(sides), c), memory.tokens(c)
    tokens = memory.result(sum(1 + h * (w + 1) for h, w in sides), c)
    CORE.assemble_tokens(y, f, split, memory.integers(corners), window, tokens)
    rows, windows = [], iter(exact(y))
    for (h, w), frame in zip(sides, exact(f), strict=True):
        rows.append(frame)
        for _ in range(h):
            rows += [*(next(windows) for _ in range(w)), exact(split)]
    return tokens, np.stack(rows)


def linear(memory: Memory, rows: int, matrices: int, k: int, n: int, quick_gelu: bool = False) -> Pair:
    x, w, bias = memory.floats(rows, matrices, k), memory.tokens(matrices, n, k), memory.floats(matrices, n)
    y = memory.result(rows, matrices, n, dtype="float32")
    CORE.linear(x, w, bias, quick_gelu, y)
    z = np.einsum("rmk,mnk->rmn", exact(x), exact(w)) + exact(bias)
    return y, z / (1 + np.exp(-1.702 * z)) if quick_gelu else z


def token_mlp(memory: Memory, rows: int, c: int, hidden: int, n: int) -> Pair:
    x, y, b1, b2 = memory.tokens(rows, c), memory.result(rows, n), memory.floats(hidden), memory.floats(n)
    (w1, first), (w2, second) = memory.weight(hidden, c), memory.weight(n, hidden)
    CORE.token_mlp(x, w1, b1, w2, b2, y)
    inner = exact(x) @ first.T + exact(b1)
    gelu = 0.5 * inner * np.vectorize(math.erfc)(-inner / math.sqrt(2))
    return y, gelu @ second.T + exact(b2)


def shifted(x: Array, kernel: tuple[int, int, int]) -> Array:
    """[taps, ...]: what each tap of a convolution of that kernel meets at each place."""
    padded = np.pad(x, [(0, 0), *((k // 2, k // 2) for k in kernel), (0, 0)])
    t, h, w = x.shape[1:4]
    return np.stack([padded[:, i : i + t, j : j + h, k : k + w] for i, j, k in np.ndindex(*kernel)])


def depthwise_gradient(memory: Memory, shape: tuple[int, ...], kernel: tuple[int, int, int] = (3, 3, 3)) -> Pairs:
    x, grad, taps, c = memory.tokens(*shape), memory.tokens(*shape), math.prod(kernel), shape[-1]
    grad_taps, grad_bias = memory.result(taps, c, dtype="float32"), memory.result(c, dtype="float32")
    CORE.depthwise_gradient(x, grad, *kernel, grad_taps, grad_bias)
    wanted = np.einsum("kbthwc,bthwc->kc", shifted(exact(x), kernel), exact(grad))
    return {"taps": (grad_taps, wanted), "bias": (grad_bias, exact(grad).sum((0, 1, 2, 3)))}


def weight_gradient(memory: Memory, rows: int, n: int, k: int, room: int = 0, add: bool = False) -> Pairs:
    """``room``: elements between rows, NaN."""
    grad, x = memory.tokens(rows, n + room), memory.tokens(rows, k + room)
    grad[:, n:] = x[:, k:] = POISON[memory.dtype]
    w, b = memory.result(n, k, dtype="float32"), memory.result(n, dtype="float32")
    before = memory.random.standard_normal((n, k)), memory.random.standard_normal(n)
    if add:
        w[...], b[...] = before
    CORE.weight_gradient(grad[:, :n], x[:, :k], w, b, add)
    wanted = exact(grad[:, :n]).T @ exact(x[:, :k]), exact(grad[:, :n]).sum(0)
    return {name: (found, sums + add * old.astype(np.float32))
            for name, found, sums, old in zip("wb", (w, b), wanted, before, strict=True)}


def patch_embed_gradient(memory: Memory, shape: tuple[int, ...], patch: int, c: int, missing: int = 0,
                         add: bool = False) -> Pairs:
    b, t, height, width = shape
    h, w, k = height // patch, width // patch, 3 * patch * patch
    x = memory.inside(stored(memory.random.standard_normal((b, t, 4, height, width)), "float32"), np.nan)
    present = memory.inside(np.arange(b * t).reshape(b, t) < b * t - missing, True)
    x[~present] = np.nan
    grad, weight, bias = memory.tokens(b, t, h, w, c), memory.result(c, k, dtype="float32"), memory.floats(c)
    before = memory.random.standard_normal((c, k)), exact(bias)
    if add:
        weight[...] = before[0]
    CORE.patch_embed_gradient(grad, x, present if missing else None, memory.floats(6), patch, add, weight, bias)
    values = exact(stored(x[:, :, :3, : h * patch, : w * patch], memory.dtype))
    values = np.where(present[:, :, None, None, None], values, 0).reshape(b, t, 3, h, patch, w, patch)
    patches = values.transpose(0, 1, 3, 5, 2, 4, 6).reshape(-1, k)
    wanted = exact(grad).reshape(-1, c).T @ patches, exact(grad).reshape(-1, c).sum(0)
    return {name: (found, sums + add * old) for name, found, sums, old
            in zip(("weight", "bias"), (weight, bias), wanted, before, strict=True)}


def through_norm(x: Array, grad: Array) -> Array:
    """The gradient of x from that of normalised(x)."""
    xhat, deviation = normalised(x), np.sqrt(x.var(-1, keepdims=True) + LAYER_NORM_EPS)
    return (grad - grad.mean(-1, keepdims=True) - xhat * (grad * xhat).mean(-1, keepdims=True)) / deviation


def through_softmax(weights: Array, grad: Array) -> Array:
    return weights * (grad - (weights * grad).sum(-1, keepdims=True))


def attention_pool_gradient(memory: Memory, lengths: tuple[int, ...], c: int, n: int, shared: bool = True,
                            outside: int = 0) -> Pairs:
    """``outside``: tokens before and behind those of all samples."""
    offsets, samples = memory.integers([outside, *accumulate(lengths, initial=outside)][1:]), len(lengths)
    x, grad = memory.tokens(sum(lengths) + 2 * outside, c), memory.floats(samples, n, c)
    queries = memory.floats(*([] if shared else [samples]), n, c, scale=2 / math.sqrt(c))
    grad_x, grad_queries = memory.result(*x.shape), memory.result(*queries.shape, dtype="float32")
    CORE.attention_pool_gradient(grad, x, queries, offsets, LAYER_NORM_EPS, grad_x, grad_queries)
    wanted_x, wanted = np.zeros(x.shape), np.zeros(grad.shape)
    for s, u in enumerate(np.broadcast_to(exact(queries), grad.shape)):
        own, g = slice(offsets[s], offsets[s + 1]), exact(grad[s])
        if lengths[s]:
            xhat = normalised(exact(x[own]))
            weights = softmax(u @ xhat.T)
            grad_logits = through_softmax(weights, g @ xhat.T)
            wanted[s] = grad_logits @ xhat
            wanted_x[own] = through_norm(exact(x[own]), weights.T @ g + grad_logits.T @ u)
    return {"x": (grad_x, wanted_x), "queries": (grad_queries, wanted.sum(0) if shared else wanted)}


def window_attention_pool_gradient(memory: Memory, grid: tuple[int, int], corners: tuple[tuple[int, ...], ...], c: int,
                                   heads: int, window: int, summed: bool = False) -> Pairs:
    width = c // heads
    matrices = [memory.weights(1, c, c), memory.weights(heads, width, c), memory.weights(heads, width, c),
                memory.weights(1, c, c)]
    (query, wq), (keys, wk), (values, wv), (out, wp) = matrices
    turned = [memory.repacked(w) for _, w in matrices]
    bq, bp = memory.floats(c), memory.floats(c)
    x, added, whole = sum_of_tokens(memory, (len(corners), *grid, c), summed)
    places = np.arange(x.size // c).reshape(*x.shape[:3], 1)
    where = np.concatenate([windows_of(p, r, window) for p, r in zip(places, corners, strict=True)])[..., 0]
    grad, grad_x = memory.tokens(len(where), c), memory.result(*x.shape)
    sums = [memory.result(*shape, dtype="float32") for shape in ((c, c), (c,), (c, c), (c, c), (c,), (c, c), (c,))]
    CORE.window_attention_pool_gradient(grad, x, added, memory.integers(corners),
                                        [query, bq, turned[1], values, out, bp, turned[0], keys, turned[2], turned[3]],
                                        heads, window, LAYER_NORM_EPS, grad_x, sums)
    tokens, g = whole.reshape(-1, c)[where], exact(grad)
    mean, xhat, wq, wp = tokens.mean(1), normalised(tokens), wq[0], wp[0]
    q = (normalised(mean) @ wq.T + exact(bq)).reshape(-1, heads, width)
    folded = np.einsum("mhd,hdc->mhc", q, wk)
    weights = softmax(folded @ xhat.swapaxes(1, 2))
    pooled = weights @ xhat
    attended = np.einsum("mhc,hdc->mhd", pooled, wv).reshape(-1, c)
    grad_heads = (g @ wp).reshape(q.shape)
    grad_pooled = np.einsum("mhd,hdc->mhc", grad_heads, wv)
    grad_logits = through_softmax(weights, grad_pooled @ xhat.swapaxes(1, 2))
    grad_folded = grad_logits @ xhat
    grad_q = np.einsum("mhc,hdc->mhd", grad_folded, wk).reshape(-1, c)
    grad_xhat = weights.swapaxes(1, 2) @ grad_pooled + grad_logits.swapaxes(1, 2) @ folded
    of_mean = g + through_norm(mean, grad_q @ wq)
    wanted = np.zeros((x.size // c, c))
    wanted[where] = through_norm(tokens, grad_xhat) + of_mean[:, None] / window**2
    expected = {
        "query": grad_q.T @ normalised(mean), "query_bias": grad_q.sum(0),
        "keys": np.einsum("mhd,mhc->hdc", q, grad_folded).reshape(c, c),
        "values": np.einsum("mhd,mhc->hdc", grad_heads, pooled).reshape(c, c),
        "values_bias": grad_heads.reshape(-1, c).sum(0), "out": g.T @ attended, "out_bias": g.sum(0)}
    return {"x": (grad_x, wanted.reshape(x.shape))} | {
        name: (found, expected[name]) for name, found in zip(expected, sums, strict=True)}


class Op(NamedTuple):
    """``roundings`` to the dtype between arguments and result, and the terms of the longest sum."""

    call: Callable[..., Any]  # a Pair, or of a gradient Pairs
    roundings: int
    terms: int
    cases: list[dict[str, Any]]  # the smallest first


RECTANGLES = ((0, 5, 0, 7), (1, 4, 2, 7), (2, 4, 4, 6))
OPS = {
    "depthwise_conv3d": Op(depthwise_conv3d, 1, 27, [
        {"shape": (1, 1, 1, 1, 1)}, {"shape": (2, 3, 3, 5, 45)}, {"shape": (1, 6, 9, 2, 70), "bias": False},
        {"shape": (2, 4, 3, 2, 19), "kernel": (3, 1, 1)}, {"shape": (1, 2, 4, 9, 24), "kernel": (1, 3, 5)}]),
    "patch_embed": Op(patch_embed, 2, 588, [
        {"shape": (1, 1, 3, 2), "patch": 2, "c": 1}, {"shape": (2, 2, 9, 13), "patch": 4, "c": 33, "missing": 1},
        {"shape": (1, 3, 29, 44), "patch": 14, "c": 45, "pixels": "uint8", "missing": 1},
        {"shape": (1, 2, 15, 7), "patch": 3, "c": 31, "pixels": "bfloat16", "bias": True},
        {"shape": (1, 1, 80, 16), "patch": 2, "c": 7, "pixels": "uint8"}]),
    "local_encoding": Op(local_encoding, 5, 90, [
        {"shape": (1, 1, 1, 1, 1), "r": 1}, {"shape": (2, 3, 4, 5, 37), "r": 24},
        {"shape": (1, 5, 27, 4, 20), "r": 33}]),
    "attention_pool": Op(attention_pool, 0, 700, [
        {"lengths": (1,), "c": 2, "n": 1}, {"lengths": (5, 0, 40, 0, 17), "c": 29, "n": 11},
        {"lengths": (3, 700), "c": 33, "n": 3, "shared": False}, {"lengths": (9,), "c": 64, "n": 8}]),
    "window_attention_pool": Op(window_attention_pool, 5, 100, [
        {"grid": (1, 1), "corners": ((0, 1, 0, 1),), "c": 2, "heads": 1, "window": 1},
        {"grid": (5, 7), "corners": RECTANGLES, "c": 40, "heads": 4, "window": 2},
        {"grid": (7, 6), "corners": ((1, 7, 0, 6), (0, 3, 3, 6)), "c": 33, "heads": 3, "window": 3, "summed": True},
        {"grid": (23, 23), "corners": ((0, 23, 0, 23),), "c": 16, "heads": 2, "window": 1}]),
    "assemble_tokens": Op(assemble_tokens, 0, 0, [
        {"corners": ((0, 1, 0, 1),), "c": 1, "window": 1}, {"corners": RECTANGLES, "c": 17, "window": 2}]),
    "linear": Op(linear, 0, 70, [
        {"rows": 1, "matrices": 1, "k": 1, "n": 1}, {"rows": 5, "matrices": 3, "k": 37, "n": 21},
        {"rows": 3, "matrices": 2, "k": 64, "n": 33, "quick_gelu": True}]),
    "token_mlp": Op(token_mlp, 2, 70, [
        {"rows": 1, "c": 1, "hidden": 1, "n": 1}, {"rows": 37, "c": 20, "hidden": 45, "n": 33},
        {"rows": 1050, "c": 5, "hidden": 6, "n": 3}]),
}
# Every result of a gradient is compared; ``terms`` and ``roundings`` are those of the one that has most.
GRADIENTS = {
    "depthwise_gradient": Op(depthwise_gradient, 0, 100, [
        {"shape": (1, 1, 1, 1, 1)}, {"shape": (2, 3, 3, 5, 45)}, {"shape": (1, 6, 9, 2, 290)},
        {"shape": (2, 4, 3, 2, 79), "kernel": (3, 1, 1)}, {"shape": (1, 2, 4, 9, 24), "kernel": (1, 3, 5)}]),
    "weight_gradient": Op(weight_gradient, 0, 1100, [
        {"rows": 1, "n": 1, "k": 1}, {"rows": 37, "n": 45, "k": 33, "room": 5}, {"rows": 1100, "n": 9, "k": 70},
        {"rows": 0, "n": 3, "k": 5}, {"rows": 31, "n": 33, "k": 17, "add": True}]),
    "patch_embed_gradient": Op(patch_embed_gradient, 0, 600, [
        {"shape": (1, 1, 3, 2), "patch": 2, "c": 1}, {"shape": (2, 2, 9, 13), "patch": 4, "c": 33, "missing": 1},
        {"shape": (1, 1, 62, 40), "patch": 2, "c": 7, "add": True}]),
    "attention_pool_gradient": Op(attention_pool_gradient, 1, 700, [
        {"lengths": (1,), "c": 5, "n": 1}, {"lengths": (5, 0, 40, 0, 17), "c": 29, "n": 11, "outside": 3},
        {"lengths": (3, 700), "c": 33, "n": 3, "shared": False}, {"lengths": (9,), "c": 64, "n": 8}]),
    "window_attention_pool_gradient": Op(window_attention_pool_gradient, 8, 600, [
        {"grid": (1, 1), "corners": ((0, 1, 0, 1),), "c": 6, "heads": 1, "window": 1},
        {"grid": (5, 7), "corners": RECTANGLES, "c": 40, "heads": 4, "window": 2},
        {"grid": (7, 6), "corners": ((1, 7, 0, 6), (0, 3, 3, 6)), "c": 33, "heads": 3, "window": 3, "summed": True},
        {"grid": (23, 46), "corners": ((0, 23, 0, 46),), "c": 16, "heads": 2, "window": 1}]),
}
CASES = [pytest.param(op, case, id=f"{name}-{i}") for name, op in OPS.items() for i, case in enumerate(op.cases)]


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("dtype", POISON)
@pytest.mark.parametrize(("op", "case"), CASES)
def test_close_to_float64_and_inside_its_arguments(op: Op, case: dict[str, Any], dtype: str, tier: str) -> None:
    memory = Memory(dtype)
    with core_module.tier(CORE, tier):
        y, exactly = op.call(memory, **case)
    share = op.roundings * EPS[dtype] + math.sqrt(op.terms) * EPS["float32"]
    limit = share * (np.abs(exactly) + np.sqrt(np.mean(exactly**2)))
    error = np.abs(exact(y) - exactly)
    assert (error <= limit).all(), f"{error.max():.2e}, at most {np.nanmax(error / limit):.1f} times the limit"
    assert not memory.overrun()


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("dtype", POISON)
@pytest.mark.parametrize(("op", "case"), [pytest.param(op, case, id=f"{name}-{i}") for name, op in GRADIENTS.items()
                                          for i, case in enumerate(op.cases)])
def test_gradients_close_to_float64_and_inside_their_arguments(op: Op, case: dict[str, Any], dtype: str,
                                                               tier: str) -> None:
    memory = Memory(dtype)
    with core_module.tier(CORE, tier):
        results = op.call(memory, **case)
    limit = op.roundings * EPS[dtype] + math.sqrt(op.terms) * EPS["float32"]
    for name, (y, exactly) in results.items():
        error, allowed = np.abs(exact(y) - exactly), limit * (np.abs(exactly) + 4 * np.sqrt(np.mean(exactly**2)))
        assert (error <= allowed).all(), f"{name}: {error.max():.2e}, {np.nanmax(error / allowed):.1f} times the limit"
    assert not memory.overrun()


EVERYTHING = """
import core_module
from test_core_ops import CORE, GRADIENTS, OPS, POISON, TIERS, Memory
def everything(tier):
    with core_module.tier(CORE, tier):
        for op in (*OPS.values(), *GRADIENTS.values()):
            for dtype in POISON:
                for case in op.cases:
                    op.call(Memory(dtype), **case)
for tier in TIERS:
    everything(tier)
CORE.set_tuning(band_tokens=7, product_rows=3, block_windows=2, stencil_rows=3, staged_channels=64)
everything(TIERS[-1])
"""
# Whole vectors only: masked stores, which GCC does not instrument, are for the guards above.
ONE_ELEMENT_SHORT = """
import numpy as np
from test_core_ops import CORE
taps, x = np.zeros((27, 64), np.float32), np.zeros((1, 1, 1, 1, 64), np.float32)
CORE.depthwise_conv3d(x, taps, None, 3, 3, 3, np.zeros(63, np.float32))
"""


@pytest.mark.parametrize(("code", "found"), [(EVERYTHING, False), (ONE_ELEMENT_SHORT, True)], ids=["all", "overrun"])
def test_under_address_and_undefined_behaviour_sanitizers(code: str, found: bool) -> None:
    environment = core_module.sanitized_environment()
    if not environment:
        pytest.skip("the compiler has no address sanitizer")
    core_module.build(sanitize=True)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment,
                          cwd=Path(__file__).parent)
    assert (done.returncode != 0) == found, done.stderr
    assert ("ERROR: AddressSanitizer" in done.stderr) == found
