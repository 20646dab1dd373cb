"""The projector: Linear, exact GELU, Linear on every token."""
from __future__ import annotations

from torch import Tensor

from ..checks import Checks
from ..spec import Cost, Draw, Inputs, OpSpec, tensor_bytes
from ._autocast import cast
from ._register import register


def _example(draw: Draw, *, shape: tuple[int, ...], hidden: int, out: int | None = None) -> Inputs:
    channels, out = shape[-1], hidden if out is None else out
    return {"x": draw(*shape), "w1": draw(hidden, channels, scale=channels**-0.5), "b1": draw(hidden, scale=0.1),
            "w2": draw(out, hidden, scale=hidden**-0.5), "b2": draw(out, scale=0.1)}


def _cost(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Cost:
    tokens = x.numel() // x.shape[-1]
    written = tokens * w2.shape[0] * x.element_size()
    return Cost(bytes=tensor_bytes(x, w1, b1, w2, b2) + written, flops=2 * tokens * (w1.numel() + w2.numel()))


SPEC = OpSpec(
    name="token_mlp",
    schema="Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2",
    source="SPEC stage 10, `video_projector`",
    reference="python_ref.ops:token_mlp",
    example=_example,
    cost=_cost,
    test_sizes={
        "packed": {"shape": (37, 64), "hidden": 96},
        "tail": {"shape": (19, 45), "hidden": 51, "out": 29},
        "grid": {"shape": (2, 3, 5, 24), "hidden": 40, "out": 17},
        "one_token": {"shape": (33,), "hidden": 48},
    },
    bench_sizes={
        "clips2": {"shape": (2184, 1024), "hidden": 4096},
        "clip_720p": {"shape": (1232, 1024), "hidden": 4096},
        "image": {"shape": (273, 1024), "hidden": 4096},
        "clip": {"shape": (1092, 1024), "hidden": 4096},
        "clips4": {"shape": (4368, 1024), "hidden": 4096},
    },
    compile_sizes={"dim1152": {"shape": (16, 1152), "hidden": 4096}, "dim1408": {"shape": (16, 1408), "hidden": 4096}},
)


def _fake(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], w2.shape[0])


_op = register(SPEC, _fake)


def token_mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *, backend: str = "auto") -> Tensor:
    """``gelu(x w1^T + b1) w2^T + b2`` with the exact (erf) GELU.

    Args:
        x: ``[..., C]``, any floating dtype, any strides.
        w1, b1: ``[hidden, C]`` and ``[hidden]``.
        w2, b2: ``[out, hidden]`` and ``[out]``.
        backend: ``auto`` or a name of ``panda_kernels.backends.NAMES``.

    Returns:
        ``[..., out]``, contiguous, dtype of ``x``.

    Raises:
        ValueError: a wrong rank or size, an empty tensor, or tensors on several devices.
        TypeError: a dtype that is not floating, or dtypes that differ.
        BackendError: the backend cannot serve the call.

    Source: SPEC stage 10, ``video_projector``.
    """
    check = Checks(SPEC.name)
    if x.ndim < 1:
        check.fail("x", "shape [..., C]", "a scalar")
    check.not_empty("x", x)
    check.floating("x", x)
    check.shape("w1", w1, ("hidden", x.shape[-1]))
    check.not_empty("w1", w1)
    check.shape("b1", b1, (w1.shape[0],))
    check.shape("w2", w2, ("out", w1.shape[0]))
    check.not_empty("w2", w2)
    check.shape("b2", b2, (w2.shape[0],))
    x, w1, b1, w2, b2 = cast(x, w1, b1, w2, b2)
    check.same(x=x, w1=w1, b1=b1, w2=w2, b2=b2)
    return _op(x, w1, b1, w2, b2, backend)


__all__ = ["SPEC", "token_mlp"]
