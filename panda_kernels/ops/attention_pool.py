"""Attention of a few given queries over normalised tokens, pooled in one pass: the core of GSTRA and FSRA."""
from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from ..checks import Checks
from ..spec import Cost, Draw, Inputs, OpSpec, tensor_bytes
from ._autocast import cast
from ._rectangle_values import check_offsets
from ._register import register


def _example(draw: Draw, *, channels: int, batch: int = 1, tokens: int = 0, lengths: tuple[int, ...] = (),
             queries: int = 8, per_sample: bool = False) -> Inputs:
    """``batch`` samples of ``tokens`` each, or, packed, one sample for each of ``lengths``."""
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32) if lengths else None
    samples = len(lengths) or batch
    x = draw(sum(lengths), channels, shift=0.3) if lengths else draw(batch, tokens, channels, shift=0.3)
    # Logits of some two units: neither a flat softmax nor a single winner.
    u = draw(*([samples] if per_sample else []), queries, channels, scale=2 * channels**-0.5)
    return {"x": x, "queries": u, "cu_seqlens": bounds, "eps": 1e-5}


def _cost(x: Tensor, queries: Tensor, cu_seqlens: Tensor | None = None, eps: float = 1e-5) -> Cost:
    channels = x.shape[-1]
    tokens = x.numel() // channels
    samples = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    result = samples * queries.shape[-2] * channels * x.element_size()
    # A query's logit and its share of the pool are a multiply-add a channel each; the normalisation takes five.
    return Cost(bytes=tensor_bytes(x, queries, cu_seqlens) + result,
                flops=tokens * channels * (4 * queries.shape[-2] + 5))


SPEC = OpSpec(
    name="attention_pool",
    schema="Tensor x, Tensor queries, Tensor? cu_seqlens, float eps",
    source="SPEC stages 3 and 7, and 'One query needs no key projection'",
    reference="python_ref.ops:attention_pool",
    example=_example,
    cost=_cost,
    test_sizes={
        "gstra": {"batch": 2, "tokens": 70, "channels": 64},
        "one_query": {"batch": 3, "tokens": 37, "channels": 45, "queries": 1},
        "eleven": {"batch": 1, "tokens": 50, "channels": 33, "queries": 11},
        "a_set_a_sample": {"batch": 2, "tokens": 19, "channels": 40, "queries": 3, "per_sample": True},
        "one_token": {"batch": 2, "tokens": 1, "channels": 16, "queries": 2},
        "packed": {"lengths": (35, 1, 64, 32, 7), "channels": 48},
        "packed_sets": {"lengths": (5, 0, 40, 0), "channels": 29, "queries": 2, "per_sample": True},
    },
    bench_sizes={
        "clips2": {"batch": 2, "tokens": 4096, "channels": 1024},
        "clip": {"batch": 1, "tokens": 4096, "channels": 1024},
        "clips4": {"batch": 4, "tokens": 4096, "channels": 1024},
        "frames8": {"lengths": (256,) * 8, "channels": 1024},
        "clip_720p": {"lengths": (144,) * 8, "channels": 1024},
        "image": {"lengths": (256,), "channels": 1024},
    },
    compile_sizes={
        "dim1152": {"batch": 1, "tokens": 16, "channels": 1152},
        "dim1152_frames": {"lengths": (16,), "channels": 1152},
        "dim1408": {"batch": 1, "tokens": 16, "channels": 1408, "queries": 11},
        "dim1408_frames": {"lengths": (16,), "channels": 1408},
    },
)


def _fake(x: Tensor, queries: Tensor, cu_seqlens: Tensor | None, eps: float) -> Tensor:
    samples = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(samples, queries.shape[-2], x.shape[-1])


def _check_values(x: Tensor, queries: Tensor, cu_seqlens: Tensor | None, eps: float) -> None:
    if cu_seqlens is not None:
        check_offsets(Checks(SPEC.name), cu_seqlens, x.shape[0])


_op = register(SPEC, _fake, _check_values)


def attention_pool(x: Tensor, queries: Tensor, *, cu_seqlens: Tensor | None = None, eps: float = 1e-5,
                   backend: str = "auto") -> Tensor:
    """Normalised tokens averaged by the softmax of their products with each query.

    ``z[s, n] = sum_i softmax_i(queries[n] . xhat[i]) xhat[i]`` over the tokens i of sample s, where ``xhat`` is the
    token's LayerNorm without affine. The scale belongs in the queries; for a learned query so do the key projection
    and the norm's weight, and value projections follow on the result (docs/numerics.md).
    Statistics, logits and softmax are in float32, in float64 for float64.

    Args:
        x: ``[B, N, C]``, or with ``cu_seqlens`` the samples packed, ``[total, C]``; any floating dtype, any strides.
        queries: ``[n, C]`` for all samples, or a set for each, ``[B, n, C]``; dtype and device of ``x``.
        cu_seqlens: int32 ``[S + 1]`` on the device of ``x``, offsets from 0 to total, or None. Read without waiting
            for the device. A sample without tokens pools to zero.
        eps: added to the variance.
        backend: ``auto`` or a name of ``panda_kernels.backends.NAMES``.

    Returns:
        ``[B, n, C]`` (packed: ``[S, n, C]``), contiguous, dtype of ``x``.

    Raises:
        ValueError: a wrong rank or size, an empty batch, a negative eps, tensors on several devices, or (where they
            are on the CPU) offsets that do not rise from 0 to total.
        TypeError: a dtype that is not floating, dtypes that differ, or ``cu_seqlens`` not int32.
        BackendError: the backend cannot serve the call.

    Source: SPEC stages 3 (GSTRA) and 7 (FSRA), "One query needs no key projection", "Values are projected after
    pooling".
    """
    check = Checks(SPEC.name)
    if cu_seqlens is None:
        check.shape("x", x, ("B", "N", "C"))
        samples = x.shape[0]
    else:
        check.shape("x", x, ("total", "C"))
        check.shape("cu_seqlens", cu_seqlens, ("S + 1",))
        if cu_seqlens.dtype != torch.int32:
            check.fail("cu_seqlens", torch.int32, cu_seqlens.dtype, TypeError)
        samples = cu_seqlens.shape[0] - 1
        if samples < 1:
            check.fail("cu_seqlens", "at least two offsets", f"{cu_seqlens.shape[0]}")
    check.not_empty("x", x)
    check.floating("x", x)
    check.shape("queries", queries, ("n", x.shape[-1]) if queries.ndim == 2 else (samples, "n", x.shape[-1]))
    check.not_empty("queries", queries)
    if eps < 0:
        check.fail("eps", "a number >= 0", eps)
    x, queries = cast(x, queries)
    check.same(x=x, queries=queries)
    check.same_device(x=x, cu_seqlens=cu_seqlens)
    return _op(x, queries, cu_seqlens, eps, backend)


__all__ = ["SPEC", "attention_pool"]
