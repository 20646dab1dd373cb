"""General channels-last depthwise 3-D convolution: the dynamic position encoding of LSTE, and any odd kernel."""
from __future__ import annotations

from torch import Tensor

from ..checks import Checks
from ..spec import Cost, Draw, Inputs, OpSpec, tensor_bytes
from ._autocast import cast
from ._register import register


def _example(draw: Draw, *, shape: tuple[int, ...], kernel: tuple[int, ...] = (3, 3, 3), bias: bool = True,
             residual: bool = True) -> Inputs:
    channels = shape[-1]
    taps = kernel[0] * kernel[1] * kernel[2]
    return {"x": draw(*shape), "weight": draw(channels, 1, *kernel, scale=taps**-0.5),
            "bias": draw(channels, scale=0.1) if bias else None, "residual": residual}


def _cost(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: bool = False) -> Cost:
    taps = weight[0].numel()
    return Cost(bytes=2 * tensor_bytes(x) + tensor_bytes(weight, bias), flops=x.numel() * (2 * taps + residual))


SPEC = OpSpec(
    name="depthwise_conv3d",
    schema="Tensor x, Tensor weight, Tensor? bias, bool residual",
    source="SPEC stage 2, `dpe`",
    reference="python_ref.ops:depthwise_conv3d",
    example=_example,
    cost=_cost,
    test_sizes={
        "stab": {"shape": (2, 4, 6, 5, 64)},
        "tail": {"shape": (1, 3, 5, 7, 45), "residual": False},
        "one_frame": {"shape": (3, 1, 3, 3, 16), "bias": False},
        "one_patch": {"shape": (1, 2, 1, 1, 33)},
        "temporal": {"shape": (2, 4, 3, 2, 40), "kernel": (3, 1, 1), "residual": False},
        "wide": {"shape": (1, 2, 4, 9, 24), "kernel": (1, 3, 5)},
    },
    bench_sizes={"clips2": {"shape": (2, 4, 32, 32, 1024)}, "image": {"shape": (1, 1, 32, 32, 1024)}},
    compile_sizes={"dim1152": {"shape": (1, 4, 4, 4, 1152)}, "dim1408": {"shape": (1, 4, 4, 4, 1408)}},
)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool) -> Tensor:
    return x.new_empty(x.shape)


_op = register(SPEC, _fake)


def depthwise_conv3d(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, residual: bool = False,
                     backend: str = "auto") -> Tensor:
    """Depthwise 3-D convolution of channels-last tokens, zero padding that keeps the grid, optional residual.

    ``y[b, t, i, j, c] = bias[c] + sum_k weight[c, 0, k] * x[b, (t, i, j) + k - kernel // 2, c] (+ x[b, t, i, j, c])``

    Args:
        x: ``[B, T, h, w, C]``, any floating dtype, any strides.
        weight: ``[C, 1, kt, kh, kw]``, odd sizes, dtype and device of ``x`` (torch's ``Conv3d`` weight).
        bias: ``[C]`` or None.
        residual: add ``x`` to the result.
        backend: ``auto`` or a name of ``panda_kernels.backends.NAMES``.

    Returns:
        ``[B, T, h, w, C]``, contiguous, dtype of ``x``.

    Raises:
        ValueError: a wrong rank or size, an even kernel, an empty batch, or tensors on several devices.
        TypeError: a dtype that is not floating, or dtypes that differ.
        BackendError: the backend cannot serve the call.

    Source: SPEC stage 2, ``dpe`` (``x2 = x1 + dw(x1)``).
    """
    check = Checks(SPEC.name)
    check.shape("x", x, ("B", "T", "h", "w", "C"))
    check.not_empty("x", x)
    check.floating("x", x)
    check.shape("weight", weight, (x.shape[-1], 1, "kt", "kh", "kw"))
    if any(k % 2 == 0 for k in weight.shape[2:]):
        check.fail("weight", "odd kernel sizes", list(weight.shape[2:]))
    if bias is not None:
        check.shape("bias", bias, (x.shape[-1],))
    x, weight, bias = cast(x, weight, bias)
    check.same(x=x, weight=weight, bias=bias)
    return _op(x, weight, bias, residual, backend)


__all__ = ["SPEC", "depthwise_conv3d"]
