"""Patches laid out as rows of a matrix, so that one product writes channels-last tokens."""
from __future__ import annotations

import torch
from torch import Tensor

from . import refusals  # noqa: F401
from ._arithmetic import linear, matmul, rows

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def whole_patches(pixels: Tensor, weight: Tensor) -> Tensor:
    """The pixels that are read, ``[B, T, h, w, 3, p, p]``: a view."""
    patch = weight.shape[-1]
    h, w = pixels.shape[3] // patch, pixels.shape[4] // patch
    whole = pixels[:, :, :3, :h * patch, :w * patch].unflatten(4, (w, patch)).unflatten(3, (h, patch))
    return whole.permute(0, 1, 3, 5, 2, 4, 6)


def missing_frames(present: Tensor) -> Tensor:
    return ~present[:, :, None, None, None, None, None]


def patch_rows(pixels: Tensor, weight: Tensor, present: Tensor | None) -> Tensor:
    """``[B, T, h, w, 3 * p * p]`` in the weight's dtype."""
    patches = whole_patches(pixels, weight)
    if pixels.dtype == torch.uint8:
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        mean = torch.tensor(CLIP_MEAN, dtype=torch.float64).mul(255).to(wide).to(pixels.device)[:, None, None]
        std = torch.tensor(CLIP_STD, dtype=torch.float64).mul(255).to(wide).to(pixels.device)[:, None, None]
        patches = (patches.to(wide) - mean) / std
    patches = patches.to(weight.dtype)
    if present is not None:
        patches = patches.masked_fill(missing_frames(present), 0.0)
    return patches.flatten(4)


def composed(weight: Tensor, embedding: Tensor) -> Tensor:
    """The embedding ``[R, 3, p, p]``, in the dtype of ``weight [R, C]``, whose tokens ``weight`` has multiplied."""
    return matmul(weight, embedding.flatten(1).to(weight.dtype)).view(-1, *embedding.shape[1:])


def fwd(pixels: Tensor, weight: Tensor, present: Tensor | None) -> Tensor:
    return linear(patch_rows(pixels, weight, present), weight.flatten(1))


def bwd(grad: Tensor, pixels: Tensor, weight: Tensor, present: Tensor | None, *,
        needs: list[bool]) -> list[Tensor | None]:
    grad_pixels = grad_weight = None
    if needs[0]:
        grad_pixels = pixels.new_zeros(pixels.shape)
        patches = matmul(grad, weight.flatten(1)).unflatten(4, weight.shape[1:])
        if present is not None:
            patches = patches.masked_fill(missing_frames(present), 0.0)
        whole_patches(grad_pixels, weight).copy_(patches)
    if needs[1]:
        grad_weight = matmul(rows(grad).T, rows(patch_rows(pixels, weight, present))).view(weight.shape)
    return [grad_pixels, grad_weight]
