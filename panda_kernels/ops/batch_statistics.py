"""What BatchNorm takes from its batch: each channel's mean and variance over all tokens."""
from __future__ import annotations

import torch
from torch import Tensor

from ..checks import Checks
from ..spec import Cost, Draw, Inputs, OpSpec, tensor_bytes
from ._autocast import cast
from ._register import register


def _example(draw: Draw, *, shape: tuple[int, ...]) -> Inputs:
    return {"x": draw(*shape, shift=0.7)}


def _cost(x: Tensor) -> Cost:
    # A sum, and a sum of squared distances.
    return Cost(bytes=tensor_bytes(x), flops=4 * x.numel())


SPEC = OpSpec(
    name="batch_statistics",
    schema="Tensor x",
    source="SPEC stage 2, `lmhra1.pos_embed.0` in training",
    reference="python_ref.ops:batch_statistics",
    example=_example,
    cost=_cost,
    test_sizes={
        "grid": {"shape": (2, 3, 4, 5, 64)},
        "tail": {"shape": (67, 45)},
        "two_tokens": {"shape": (2, 24)},
        "one_channel": {"shape": (5, 1)},
    },
    bench_sizes={
        "clips2": {"shape": (2, 4, 32, 32, 1024)},
        "clip": {"shape": (1, 4, 32, 32, 1024)},
        "clips4": {"shape": (4, 4, 32, 32, 1024)},
    },
    compile_sizes={"dim1152": {"shape": (16, 1152)}, "dim1408": {"shape": (16, 1408)}},
)


def _fake(x: Tensor) -> Tensor:
    return x.new_empty(2, x.shape[-1], dtype=torch.promote_types(x.dtype, torch.float32))


_op = register(SPEC, _fake)


def batch_statistics(x: Tensor, *, backend: str = "auto") -> Tensor:
    """Mean and biased variance of each channel, taken block by block without a float32 copy of the tokens.

    Args:
        x: ``[..., C]``, any floating dtype, any strides.
        backend: ``auto`` or a name of ``panda_kernels.backends.NAMES``.

    Returns:
        ``[2, C]``, means over variances; float32, float64 for float64.

    Raises:
        ValueError: a scalar, or an empty tensor.
        TypeError: a dtype that is not floating.
        BackendError: the backend cannot serve the call.

    Source: SPEC stage 2, ``lmhra1.pos_embed.0`` in training.
    """
    check = Checks(SPEC.name)
    if x.ndim < 1:
        check.fail("x", "shape [..., C]", "a scalar")
    check.not_empty("x", x)
    check.floating("x", x)
    (x,) = cast(x)
    return _op(x, backend)


__all__ = ["SPEC", "batch_statistics"]
