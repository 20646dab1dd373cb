"""Patches by panda_kernels/triton/patch_embed.py, products by torch."""
from __future__ import annotations

import torch
from torch import Tensor

from ...triton.patch_embed import extract_patches, put_patches_back, row_length
from ..torch.patch_embed import CLIP_MEAN, CLIP_STD
from . import refusals  # noqa: F401


def patch_rows(pixels: Tensor, patch: int, dtype: torch.dtype, present: Tensor | None) -> Tensor:
    """``[B * T * h * w, row_length]`` of pixels in any strides, normalised if they are uint8."""
    if pixels.stride(4) != 1:
        pixels = pixels[:, :, :3].contiguous()
    mean, std = (CLIP_MEAN, CLIP_STD) if pixels.dtype == torch.uint8 else (None, None)
    return extract_patches(pixels, patch, dtype, None if present is None else present.contiguous(), mean, std)


def _patches(pixels: Tensor, weight: Tensor, present: Tensor | None) -> Tensor:
    return patch_rows(pixels, weight.shape[3], weight.dtype, present)


def weight_rows(weight: Tensor) -> Tensor:
    """``[C, row_length]``, padded as the patches are."""
    length, used = row_length(weight.shape[3], weight.dtype), weight[0].numel()
    if length == used:
        return weight.flatten(1)
    rows = torch.empty(weight.shape[0], length, dtype=weight.dtype, device=weight.device)
    rows[:, :used] = weight.flatten(1)
    rows[:, used:] = 0
    return rows


def fwd(pixels: Tensor, weight: Tensor, present: Tensor | None) -> Tensor:
    patch, channels = weight.shape[3], weight.shape[0]
    y = torch.empty(*pixels.shape[:2], pixels.shape[3] // patch, pixels.shape[4] // patch, channels,
                    dtype=weight.dtype, device=weight.device)
    torch.mm(_patches(pixels, weight, present), weight_rows(weight).t(), out=y.view(-1, channels))
    return y


def bwd(grad: Tensor, pixels: Tensor, weight: Tensor, present: Tensor | None, *,
        needs: list[bool]) -> list[Tensor | None]:
    grads: list[Tensor | None] = [None] * len(needs)
    grad = grad.reshape(-1, weight.shape[0])
    if needs[0]:
        patches = torch.mm(grad, weight_rows(weight))
        grads[0] = put_patches_back(patches, pixels, weight.shape[3], None if present is None else present.contiguous())
    if needs[1]:
        rows = torch.mm(grad.t(), _patches(pixels, weight, present))
        grads[1] = rows[:, :weight[0].numel()].reshape(weight.shape)
    return grads
