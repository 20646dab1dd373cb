"""Assembly: each frame's token, then the rows of its window tokens, each closed by the split token; packed."""
from __future__ import annotations

import torch
from torch import Tensor

from ..checks import Checks
from ..spec import Cost, Draw, Inputs, OpSpec, tensor_bytes
from ._autocast import cast
from ._rectangle_values import check_corners
from ._register import register


def _example(draw: Draw, *, corners: tuple[tuple[int, int, int, int], ...], channels: int,
             window: int = 2) -> Inputs:
    grids = [((r1 - r0) // window, (c1 - c0) // window) for r0, r1, c0, c1 in corners]
    return {"y": draw(sum(h * w for h, w in grids), channels), "f": draw(len(corners), channels),
            "split": draw(channels), "corners": torch.tensor(corners, dtype=torch.int64),
            "num_tokens": sum(1 + h * (w + 1) for h, w in grids), "window": window}


def _cost(y: Tensor, f: Tensor, split: Tensor, corners: Tensor, num_tokens: int, window: int = 2) -> Cost:
    written = num_tokens * y.shape[-1] * y.element_size()
    return Cost(bytes=tensor_bytes(y, f, split, corners) + written, flops=0)


_FULL = (0, 32, 0, 32)
_WIDE = (6, 24, 0, 32)  # a 720p video in a square of 448

SPEC = OpSpec(
    name="assemble_tokens",
    schema="Tensor y, Tensor f, Tensor split, Tensor corners, SymInt num_tokens, int window",
    source="SPEC stage 9, `split_embedding`",
    reference="python_ref.ops:assemble_tokens",
    example=_example,
    cost=_cost,
    test_sizes={
        "ragged": {"corners": ((0, 6, 0, 8), (1, 4, 2, 8), (0, 5, 3, 6), (2, 6, 0, 7)), "channels": 64},
        "image": {"corners": ((0, 5, 0, 7),), "channels": 45},
        "window3": {"corners": ((0, 7, 0, 6), (1, 4, 3, 6)), "channels": 33, "window": 3},
        "one_window": {"corners": ((0, 2, 0, 2),), "channels": 1},
    },
    bench_sizes={
        "clips2": {"corners": (_FULL,) * 8, "channels": 1024},
        "clip_720p": {"corners": (_WIDE,) * 8, "channels": 1024},
        "image": {"corners": (_FULL,), "channels": 1024},
        "clip": {"corners": (_FULL,) * 4, "channels": 1024},
        "clips4": {"corners": (_FULL,) * 16, "channels": 1024},
    },
    compile_sizes={
        "dim1152": {"corners": ((0, 4, 0, 4),), "channels": 1152},
        "dim1408": {"corners": ((0, 4, 0, 4),), "channels": 1408},
        "window3": {"corners": ((0, 6, 0, 6),), "channels": 1024, "window": 3},
    },
)


def _fake(y: Tensor, f: Tensor, split: Tensor, corners: Tensor, num_tokens: int, window: int) -> Tensor:
    return y.new_empty(num_tokens, y.shape[-1])


def _check_values(y: Tensor, f: Tensor, split: Tensor, corners: Tensor, num_tokens: int, window: int) -> None:
    check = Checks(SPEC.name)
    held = check_corners(check, corners, window)
    if held is not None and held[0] != y.shape[0]:
        check.fail("y", f"{held[0]} windows, which the corners hold", y.shape[0])
    if held is not None and held[1] != num_tokens:
        check.fail("num_tokens", f"{held[1]}, which the corners hold", num_tokens)


_op = register(SPEC, _fake, _check_values)


def assemble_tokens(y: Tensor, f: Tensor, split: Tensor, corners: Tensor, num_tokens: int, *, window: int = 2,
                    backend: str = "auto") -> Tensor:
    """Ragged frames to packed tokens: per frame ``[f; row 0 of y; split; row 1 of y; split; ...]``.

    Args:
        y: ``[num_windows, C]``, the frames' window tokens, packed; any floating dtype, any strides.
        f: ``[frames, C]``, a token for each frame.
        split: ``[C]``, the token that ends a row.
        corners: int64 ``[frames, 4]`` on the device of ``y``: row0, row1, col0, col1 in patches, ends exclusive; read
            without waiting for the device. :class:`panda_kernels.Rectangles` has them and the number of tokens.
        num_tokens: tokens of all frames together, ``sum(1 + h' * (w' + 1))``.
        window: side of a window in patches.
        backend: ``auto`` or a name of ``panda_kernels.backends.NAMES``.

    Returns:
        ``[num_tokens, C]``, contiguous, dtype of ``y``; ``Rectangles.cu_seqlens`` has the frames' offsets.

    Raises:
        ValueError: a wrong rank or size, an empty batch, fewer tokens than windows and frames, tensors on several
            devices, or (where they are on the CPU) corners out of order or holding other numbers of windows or tokens.
        TypeError: a dtype that is not floating, dtypes that differ, or corners not int64.
        BackendError: the backend cannot serve the call.

    Source: SPEC stage 9, ``split_embedding``.
    """
    check = Checks(SPEC.name)
    check.shape("y", y, ("num_windows", "C"))
    check.not_empty("y", y)
    check.floating("y", y)
    check.shape("f", f, ("frames", y.shape[-1]))
    check.not_empty("f", f)
    check.shape("split", split, (y.shape[-1],))
    check.shape("corners", corners, (f.shape[0], 4))
    if corners.dtype != torch.int64:
        check.fail("corners", torch.int64, corners.dtype, TypeError)
    if window < 1:
        check.fail("window", "at least 1", window)
    if num_tokens <= y.shape[0] + f.shape[0]:
        check.fail("num_tokens", f"more than the {y.shape[0]} windows and {f.shape[0]} frames", num_tokens)
    y, f, split = cast(y, f, split)
    check.same(y=y, f=f, split=split)
    check.same_device(y=y, corners=corners)
    return _op(y, f, split, corners, num_tokens, window, backend)


__all__ = ["SPEC", "assemble_tokens"]
