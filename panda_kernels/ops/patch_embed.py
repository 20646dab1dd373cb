"""Patch embedding: one convolution whose kernel and stride are the patch, straight to channels-last tokens."""
from __future__ import annotations

import torch
from torch import Tensor

from ..checks import Checks
from ..spec import Cost, Draw, Inputs, OpSpec, tensor_bytes
from ._autocast import cast
from ._register import register


def _example(draw: Draw, *, shape: tuple[int, int, int, int], channels: int, patch: int = 14, planes: int = 4,
             uint8: bool = False, missing: int = 0) -> Inputs:
    """``shape`` is B, T, H, W; the last ``missing`` frames are absent."""
    batch, frames, height, width = shape
    size = (batch, frames, planes, height, width)
    pixels = torch.randint(0, 256, size, dtype=torch.uint8, generator=draw.generator) if uint8 else draw(*size)
    present = torch.arange(batch * frames).view(batch, frames) < batch * frames - missing if missing else None
    return {"pixels": pixels, "weight": draw(channels, 3, patch, patch, scale=(3 * patch * patch)**-0.5),
            "present": present}


def _cost(pixels: Tensor, weight: Tensor, present: Tensor | None = None) -> Cost:
    batch, frames, _, height, width = pixels.shape
    channels, _, patch, _ = weight.shape
    tokens = batch * frames * (height // patch) * (width // patch)
    read = tokens * weight[0].numel() * pixels.element_size()
    written = tokens * channels * weight.element_size()
    return Cost(bytes=read + written + tensor_bytes(weight), flops=2 * tokens * weight.numel())


SPEC = OpSpec(
    name="patch_embed",
    schema="Tensor pixels, Tensor weight, Tensor? present",
    source="SPEC stage 1, `patch_embedding`",
    reference="python_ref.ops:patch_embed",
    example=_example,
    cost=_cost,
    test_sizes={
        "stab": {"shape": (2, 4, 42, 28), "channels": 64},
        "tail": {"shape": (1, 3, 47, 60), "channels": 45, "planes": 3},
        "bytes": {"shape": (1, 2, 43, 29), "channels": 24, "uint8": True},
        "missing": {"shape": (2, 2, 28, 42), "channels": 33, "uint8": True, "missing": 1},
        "missing_float": {"shape": (1, 2, 28, 28), "channels": 16, "missing": 1},
        "one_patch": {"shape": (3, 1, 14, 14), "channels": 16},
        "small_patch": {"shape": (1, 1, 12, 20), "channels": 9, "patch": 4},
    },
    bench_sizes={
        "clips2": {"shape": (2, 4, 448, 448), "channels": 1024},
        "clips2_uint8": {"shape": (2, 4, 448, 448), "channels": 1024, "planes": 3, "uint8": True},
        "image": {"shape": (1, 1, 448, 448), "channels": 1024},
        "clip": {"shape": (1, 4, 448, 448), "channels": 1024},
        "clips4": {"shape": (4, 4, 448, 448), "channels": 1024},
    },
    compile_sizes={
        "missing": {"shape": (1, 2, 28, 448), "channels": 64, "missing": 1},
        "missing_uint8": {"shape": (1, 2, 28, 448), "channels": 64, "planes": 3, "uint8": True, "missing": 1},
    },
)


def _fake(pixels: Tensor, weight: Tensor, present: Tensor | None) -> Tensor:
    batch, frames, _, height, width = pixels.shape
    channels, _, patch, _ = weight.shape
    return weight.new_empty(batch, frames, height // patch, width // patch, channels)


_op = register(SPEC, _fake)


def patch_embed(pixels: Tensor, weight: Tensor, *, present: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Square patches of pixels to tokens: a convolution with kernel and stride ``p``, without bias.

    Pixels are cast to the weight's dtype; uint8 ones are normalised on the way, ``(v / 255 - mean) / std`` with CLIP's
    mean and std, and get no gradient. Pixels beyond the last whole patch are dropped.

    Args:
        pixels: ``[B, T, P, H, W]`` with ``P >= 3`` planes of which the first three are read (a validity mask may
            follow); normalised floats of any dtype, or bytes; any strides.
        weight: ``[C, 3, p, p]``, any floating dtype (torch's ``Conv2d`` weight).
        present: bool ``[B, T]`` or None. A frame that is False counts as all-zero normalised pixels, whatever it
            holds, and gives zeros.
        backend: ``auto`` or a name of ``panda_kernels.backends.NAMES``.

    Returns:
        ``[B, T, H // p, W // p, C]``, contiguous, dtype of ``weight``.

    Raises:
        ValueError: a wrong rank or size, fewer than three planes, an image smaller than a patch, an empty batch, or
            tensors on several devices.
        TypeError: pixels that are neither floating nor uint8, a weight that is not floating, or ``present`` not bool.
        BackendError: the backend cannot serve the call.

    Source: SPEC stage 1, ``patch_embedding``.
    """
    check_patches(Checks(SPEC.name), pixels, weight, present)
    pixels, weight = cast(pixels, weight)
    return _op(pixels, weight, present, backend)


def check_patches(check: Checks, pixels: Tensor, weight: Tensor, present: Tensor | None, *,
                  name: str = "weight") -> None:
    """What :func:`patch_embed` raises of its arguments; ``name`` is the weight's."""
    check.shape("pixels", pixels, ("B", "T", "P", "H", "W"))
    check.not_empty("pixels", pixels)
    check.floating("pixels", pixels, also=(torch.uint8,))
    if pixels.shape[2] < 3:
        check.fail("pixels", "at least 3 planes", f"{pixels.shape[2]}")
    check.shape(name, weight, ("C", 3, "p", "p"))
    check.not_empty(name, weight)
    check.floating(name, weight)
    patch = weight.shape[3]
    if weight.shape[2] != patch:
        check.fail(name, "square patches", f"{weight.shape[2]} x {patch}")
    if pixels.shape[3] < patch or pixels.shape[4] < patch:
        check.fail("pixels", f"at least one patch of {patch} x {patch}",
                   f"{pixels.shape[3]} x {pixels.shape[4]} pixels")
    if present is not None:
        check.shape("present", present, pixels.shape[:2])
        if present.dtype != torch.bool:
            check.fail("present", torch.bool, present.dtype, TypeError)
    check.same_device(**{"pixels": pixels, name: weight, "present": present})


__all__ = ["SPEC", "patch_embed"]
