"""LSD, local spatial downsampling: the mean of each window attends to the window's tokens, rectangle by rectangle."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import Checks
from ..spec import Cost, Draw, Inputs, OpSpec, tensor_bytes
from ._autocast import cast
from ._rectangle_values import check_corners
from ._register import call_kept, register

_RAGGED = ((0, 6, 0, 8), (1, 4, 2, 8), (0, 5, 3, 6), (2, 6, 0, 7))


def _example(draw: Draw, *, grid: tuple[int, int], corners: tuple[tuple[int, int, int, int], ...], channels: int,
             num_heads: int = 8, window: int = 2, scale: float | None = None) -> Inputs:
    windows = sum(((r1 - r0) // window) * ((c1 - c0) // window) for r0, r1, c0, c1 in corners)
    square = channels**-0.5
    return {
        "x": draw(len(corners), *grid, channels, shift=0.2),
        "corners": torch.tensor(corners, dtype=torch.int64), "num_windows": windows,
        "q_norm_weight": draw(channels, scale=0.2, shift=1.0), "q_norm_bias": draw(channels, scale=0.2),
        # Queries large enough that the softmax is far from flat although the scale is that of the full width.
        "wq": draw(channels, channels, scale=3 * square),
        "kv_norm_weight": draw(channels, scale=0.2, shift=1.0), "kv_norm_bias": draw(channels, scale=0.2),
        "wkv": draw(2 * channels, channels, scale=square),
        "wp": draw(channels, channels, scale=square), "bp": draw(channels, scale=0.1),
        "num_heads": num_heads, "window": window, "eps": 1e-5, "scale": scale,
    }


def _cost(x: Tensor, corners: Tensor, num_windows: int, q_norm_weight: Tensor, q_norm_bias: Tensor, wq: Tensor,
          kv_norm_weight: Tensor, kv_norm_bias: Tensor, wkv: Tensor, wp: Tensor, bp: Tensor, num_heads: int = 8,
          window: int = 2, eps: float = 1e-5, scale: float | None = None) -> Cost:
    channels, tokens = x.shape[-1], window * window
    # The folded form: four products of C x C, and each head's logits and pool over the window's tokens.
    per_window = 4 * 2 * channels**2 + 2 * 2 * num_heads * tokens * channels
    weights = tensor_bytes(q_norm_weight, q_norm_bias, wq, kv_norm_weight, kv_norm_bias, wkv, wp, bp)
    moved = num_windows * (tokens + 1) * channels * x.element_size()
    return Cost(bytes=moved + weights, flops=num_windows * per_window)


_FULL = (0, 32, 0, 32)
_WIDE = (6, 24, 0, 32)  # a 720p video in a square of 448

SPEC = OpSpec(
    name="window_attention_pool",
    schema="Tensor x, Tensor corners, SymInt num_windows, Tensor q_norm_weight, Tensor q_norm_bias, Tensor wq, "
           "Tensor kv_norm_weight, Tensor kv_norm_bias, Tensor wkv, Tensor wp, Tensor bp, int num_heads, int window, "
           "float eps, float? scale",
    source="SPEC stage 6, `local_attention`",
    reference="python_ref.ops:window_attention_pool",
    example=_example,
    cost=_cost,
    test_sizes={
        "ragged": {"grid": (6, 8), "corners": _RAGGED, "channels": 64},
        "image": {"grid": (5, 7), "corners": ((0, 5, 0, 7),), "channels": 40, "num_heads": 4},
        "window3": {"grid": (7, 6), "corners": ((0, 7, 0, 6), (1, 4, 3, 6)), "channels": 36, "num_heads": 2,
                    "window": 3},
        "one_head": {"grid": (4, 4), "corners": ((0, 4, 0, 4), (2, 4, 1, 4)), "channels": 21, "num_heads": 1,
                     "scale": 0.3},
        "one_window": {"grid": (2, 2), "corners": ((0, 2, 0, 2),), "channels": 24},
    },
    bench_sizes={
        "clips2": {"grid": (32, 32), "corners": (_FULL,) * 8, "channels": 1024},
        "clip_720p": {"grid": (32, 32), "corners": (_WIDE,) * 8, "channels": 1024},
        "image": {"grid": (32, 32), "corners": (_FULL,), "channels": 1024},
        "clip": {"grid": (32, 32), "corners": (_FULL,) * 4, "channels": 1024},
        "clips4": {"grid": (32, 32), "corners": (_FULL,) * 16, "channels": 1024},
    },
    compile_sizes={
        "dim1152": {"grid": (2, 2), "corners": ((0, 2, 0, 2),), "channels": 1152},
        "dim1408": {"grid": (2, 2), "corners": ((0, 2, 0, 2),), "channels": 1408},
        "window3": {"grid": (3, 3), "corners": ((0, 3, 0, 3),), "channels": 1024, "window": 3},
    },
)


def _fake(x: Tensor, corners: Tensor, num_windows: int, *rest: object) -> Tensor:
    return x.new_empty(num_windows, x.shape[-1])


def _check_values(x: Tensor, corners: Tensor, num_windows: int, *rest: object) -> None:
    check, window = Checks(SPEC.name), rest[-3]
    assert isinstance(window, int)
    held = check_corners(check, corners, window, rows=x.shape[1], cols=x.shape[2])
    if held is not None and held[0] != num_windows:
        check.fail("num_windows", f"{held[0]}, which the corners hold", num_windows)


_op = register(SPEC, _fake, _check_values)


def window_attention_pool(
    x: Tensor, corners: Tensor, num_windows: int, q_norm_weight: Tensor, q_norm_bias: Tensor, wq: Tensor,
    kv_norm_weight: Tensor, kv_norm_bias: Tensor, wkv: Tensor, wp: Tensor, bp: Tensor, *, num_heads: int = 8,
    window: int = 2, eps: float = 1e-5, scale: float | None = None, backend: str = "auto",
) -> Tensor:
    """One token for each window of each frame's rectangle: the window's mean, attending to the window's tokens.

    ``r = mean(window)``, ``q = wq LN_q(r)``, ``k, v = wkv LN_kv(tokens)``,
    ``y = r + wp softmax(scale q k) v + bp``; heads are contiguous slices of channels. Rows and columns of a
    rectangle that do not fill a window are dropped. Logits and softmax are in float32, in float64 for float64.

    Args:
        x: ``[frames, h, w, C]``, any floating dtype, any strides.
        corners: int64 ``[frames, 4]`` on the device of ``x``: row0, row1, col0, col1 in patches, ends exclusive; read
            without waiting for the device. :class:`panda_kernels.Rectangles` has them and the number of windows.
        num_windows: windows in all rectangles together.
        q_norm_weight, q_norm_bias, kv_norm_weight, kv_norm_bias: ``[C]``.
        wq, wkv, wp: ``[C, C]``, ``[2C, C]`` (keys over values), ``[C, C]``; bp: ``[C]``.
        num_heads: divides C.
        window: side of a window in patches.
        eps: added to the variances.
        scale: of the logits, ``C**-0.5`` (of the full width) if None.
        backend: ``auto`` or a name of ``panda_kernels.backends.NAMES``.

    Returns:
        ``[num_windows, C]``, frame by frame, row by row; contiguous, dtype of ``x``.

    Raises:
        ValueError: a wrong rank or size, heads that do not divide C, a window larger than the grid, an empty batch,
            tensors on several devices, or (where they are on the CPU) corners outside the grid, out of order, or
            holding another number of windows.
        TypeError: a dtype that is not floating, dtypes that differ, or corners not int64.
        BackendError: the backend cannot serve the call.

    Source: SPEC stage 6, ``local_attention``.
    """
    return _op(*_checked(x, corners, num_windows, q_norm_weight, q_norm_bias, wq, kv_norm_weight, kv_norm_bias, wkv, wp,
                         bp, num_heads=num_heads, window=window, eps=eps, scale=scale, backend=backend))


def of_sum(added: Tensor, x: Tensor, *others: Any, **options: Any) -> Tensor:
    """:func:`window_attention_pool` of ``x + added``, whose gradient ``x`` receives and ``added`` does not.

    A backend that keeps something for the gradient keeps the two in place of their sum.
    """
    args = _checked(x, *others, **options)
    check = Checks(SPEC.name)
    check.shape("added", added, x.shape)
    check.same_device(x=x, added=added)
    more = added.detach().to(args[0].dtype)
    y = call_kept(SPEC.name, _check_values, args, added=more)
    return _op(args[0] + more, *args[1:]) if y is None else y


def _checked(x: Tensor, corners: Tensor, num_windows: int, q_norm_weight: Tensor, q_norm_bias: Tensor, wq: Tensor,
             kv_norm_weight: Tensor, kv_norm_bias: Tensor, wkv: Tensor, wp: Tensor, bp: Tensor, *, num_heads: int = 8,
             window: int = 2, eps: float = 1e-5, scale: float | None = None, backend: str = "auto") -> tuple[Any, ...]:
    """The arguments of the torch op, cast as autocast wants them."""
    check = Checks(SPEC.name)
    check.shape("x", x, ("frames", "h", "w", "C"))
    check.not_empty("x", x)
    check.floating("x", x)
    frames, h, w, channels = x.shape
    check.shape("corners", corners, (frames, 4))
    if corners.dtype != torch.int64:
        check.fail("corners", torch.int64, corners.dtype, TypeError)
    for name, vector in (("q_norm_weight", q_norm_weight), ("q_norm_bias", q_norm_bias),
                         ("kv_norm_weight", kv_norm_weight), ("kv_norm_bias", kv_norm_bias), ("bp", bp)):
        check.shape(name, vector, (channels,))
    check.shape("wq", wq, (channels, channels))
    check.shape("wkv", wkv, (2 * channels, channels))
    check.shape("wp", wp, (channels, channels))
    if num_heads < 1 or channels % num_heads:
        check.fail("num_heads", f"a divisor of the {channels} channels", num_heads)
    if not 1 <= window <= min(h, w):
        check.fail("window", f"from 1 to the smaller side of the grid of {h} x {w}", window)
    if num_windows < 1:
        check.fail("num_windows", "at least 1", num_windows)
    if eps < 0:
        check.fail("eps", "a number >= 0", eps)
    x, q_norm_weight, q_norm_bias, wq, kv_norm_weight, kv_norm_bias, wkv, wp, bp = cast(
        x, q_norm_weight, q_norm_bias, wq, kv_norm_weight, kv_norm_bias, wkv, wp, bp)
    check.same(x=x, q_norm_weight=q_norm_weight, q_norm_bias=q_norm_bias, wq=wq, kv_norm_weight=kv_norm_weight,
               kv_norm_bias=kv_norm_bias, wkv=wkv, wp=wp, bp=bp)
    check.same_device(x=x, corners=corners)
    return (x, corners, num_windows, q_norm_weight, q_norm_bias, wq, kv_norm_weight, kv_norm_bias, wkv, wp, bp,
            num_heads, window, eps, scale, backend)


__all__ = ["SPEC", "window_attention_pool"]
