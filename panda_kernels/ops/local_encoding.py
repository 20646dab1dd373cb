"""LSTE, local spatio-temporal encoding, in one op: a bottleneck over time, then the dynamic position encoding."""
from __future__ import annotations

import torch
from torch import Tensor

from ..checks import Checks
from ..spec import Cost, Draw, Inputs, OpSpec, tensor_bytes
from ._autocast import cast
from ._register import register


def _example(draw: Draw, *, shape: tuple[int, ...], reduced: int | None = None, norm_float32: bool = False) -> Inputs:
    channels = shape[-1]
    inner = int(channels / 1.5) if reduced is None else reduced
    scale, shift = draw(channels, scale=0.2, shift=1.0), draw(channels, scale=0.2)
    return {
        "x": draw(*shape),
        "norm_scale": scale.float() if norm_float32 else scale, "norm_shift": shift.float() if norm_float32 else shift,
        "w1": draw(inner, channels, scale=channels**-0.5), "b1": draw(inner, scale=0.1),
        "wt": draw(inner, 3, scale=3**-0.5), "bt": draw(inner, scale=0.1),
        "w2": draw(channels, inner, scale=inner**-0.5), "b2": draw(channels, scale=0.1),
        "wd": draw(channels, 1, 3, 3, 3, scale=27**-0.5), "bd": draw(channels, scale=0.1),
    }


def _cost(x: Tensor, norm_scale: Tensor, norm_shift: Tensor, w1: Tensor, b1: Tensor, wt: Tensor, bt: Tensor,
          w2: Tensor, b2: Tensor, wd: Tensor, bd: Tensor) -> Cost:
    reduced, channels = w1.shape
    tokens = x.numel() // channels
    # Products with their biases, three taps and a bias, the residual, then 27 taps, a bias and the residual.
    per_token = 2 * (2 * reduced * channels) + reduced + channels + reduced * 7 + channels + channels * (2 * 27 + 2)
    weights = tensor_bytes(norm_scale, norm_shift, w1, b1, wt, bt, w2, b2, wd, bd)
    return Cost(bytes=2 * tensor_bytes(x) + weights, flops=tokens * per_token)


SPEC = OpSpec(
    name="local_encoding",
    schema="Tensor x, Tensor norm_scale, Tensor norm_shift, Tensor w1, Tensor b1, Tensor wt, Tensor bt, Tensor w2, "
           "Tensor b2, Tensor wd, Tensor bd",
    source="SPEC stage 2, `lmhra1` and `dpe`",
    reference="python_ref.ops:local_encoding",
    example=_example,
    cost=_cost,
    test_sizes={
        "stab": {"shape": (2, 4, 4, 5, 64)},
        "float32_norm": {"shape": (1, 4, 3, 3, 48), "norm_float32": True},
        "tail": {"shape": (1, 3, 5, 3, 45)},
        "two_frames": {"shape": (1, 2, 3, 4, 32), "reduced": 19},
        "one_frame": {"shape": (2, 1, 3, 3, 24)},
        "one_patch": {"shape": (1, 4, 1, 1, 33)},
    },
    bench_sizes={
        "clips2": {"shape": (2, 4, 32, 32, 1024)},
        "clip": {"shape": (1, 4, 32, 32, 1024)},
        "clips4": {"shape": (4, 4, 32, 32, 1024)},
        "dim1408": {"shape": (1, 4, 32, 32, 1408)},
    },
    compile_sizes={
        "dim1152": {"shape": (1, 4, 4, 4, 1152)},
        **{f"frames{frames}": {"shape": (1, frames, 4, 4, 1024)} for frames in (1, 2, 3, 5)},
    },
)


def _fake(x: Tensor, norm_scale: Tensor, norm_shift: Tensor, w1: Tensor, b1: Tensor, wt: Tensor, bt: Tensor,
          w2: Tensor, b2: Tensor, wd: Tensor, bd: Tensor) -> Tensor:
    return x.new_empty(x.shape)


_op = register(SPEC, _fake)


def local_encoding(x: Tensor, norm_scale: Tensor, norm_shift: Tensor, w1: Tensor, b1: Tensor, wt: Tensor, bt: Tensor,
                   w2: Tensor, b2: Tensor, wd: Tensor, bd: Tensor, *, backend: str = "auto") -> Tensor:
    """The whole of LSTE on channels-last tokens.

    ``x1 = x + W2 * tconv(W1 * (x * norm_scale + norm_shift) + b1) + b2``, then ``x2 = x1 + dw(x1)``: ``tconv``
    depthwise over time with kernel 3, ``dw`` depthwise 3x3x3, both zero padded.

    Args:
        x: ``[B, T, h, w, C]``, any floating dtype, any strides.
        norm_scale, norm_shift: ``[C]``, float32 or the dtype of ``x``: BatchNorm as an affine map, from running or
            from batch statistics.
        w1, b1: ``[R, C]`` and ``[R]``, the projection down.
        wt, bt: ``[R, 3]`` and ``[R]``, the taps over time (previous, same, next frame).
        w2, b2: ``[C, R]`` and ``[C]``, the projection up.
        wd, bd: ``[C, 1, 3, 3, 3]`` and ``[C]``, the position encoding (torch's ``Conv3d`` weight).
        backend: ``auto`` or a name of ``panda_kernels.backends.NAMES``.

    Returns:
        x2, ``[B, T, h, w, C]``, contiguous, dtype of ``x``.

    Raises:
        ValueError: a wrong rank or size, an empty batch, or tensors on several devices.
        TypeError: a dtype that is not floating, or dtypes that differ.
        BackendError: the backend cannot serve the call.

    Source: SPEC stage 2, ``lmhra1`` and ``dpe``.
    """
    check = Checks(SPEC.name)
    check.shape("x", x, ("B", "T", "h", "w", "C"))
    check.not_empty("x", x)
    check.floating("x", x)
    channels = x.shape[-1]
    check.shape("w1", w1, ("R", channels))
    check.not_empty("w1", w1)
    reduced = w1.shape[0]
    expected: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "norm_scale": (norm_scale, (channels,)), "norm_shift": (norm_shift, (channels,)), "b1": (b1, (reduced,)),
        "wt": (wt, (reduced, 3)), "bt": (bt, (reduced,)), "w2": (w2, (channels, reduced)), "b2": (b2, (channels,)),
        "wd": (wd, (channels, 1, 3, 3, 3)), "bd": (bd, (channels,)),
    }
    for name, (tensor, shape) in expected.items():
        check.shape(name, tensor, shape)
    x, w1, b1, wt, bt, w2, b2, wd, bd = cast(x, w1, b1, wt, bt, w2, b2, wd, bd)
    check.same(x=x, w1=w1, b1=b1, wt=wt, bt=bt, w2=w2, b2=b2, wd=wd, bd=bd)
    check.same_device(x=x, norm_scale=norm_scale, norm_shift=norm_shift)
    for name, tensor in (("norm_scale", norm_scale), ("norm_shift", norm_shift)):
        if tensor.dtype not in (torch.float32, x.dtype):
            check.fail(name, f"torch.float32 or {x.dtype} as x", tensor.dtype, TypeError)
    return _op(x, norm_scale, norm_shift, w1, b1, wt, bt, w2, b2, wd, bd, backend)


__all__ = ["SPEC", "local_encoding"]
