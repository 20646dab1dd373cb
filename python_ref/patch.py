"""Stage 1, patch embedding: one convolution whose kernel and stride are the patch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def normalise(pixels: Tensor) -> Tensor:
    """uint8 pixels ``[B, T, 3, H, W]`` -> CLIP-normalised ones, in float64: ``(x / 255 - mean) / std``."""
    mean = torch.tensor(CLIP_MEAN, dtype=torch.float64, device=pixels.device).view(3, 1, 1)
    std = torch.tensor(CLIP_STD, dtype=torch.float64, device=pixels.device).view(3, 1, 1)
    return (pixels.to(torch.float64) / 255 - mean) / std


def patch_embed(pixels: Tensor, weight: Tensor, *, present: Tensor | None = None) -> Tensor:
    """Pixels ``[B, T, >=3, H, W]`` (float, or uint8 to be normalised), weight ``[C, 3, p, p]`` -> ``[B, T, h, w, C]``.

    Only three channels are read; pixels beyond the last whole patch are dropped. A frame that ``present`` (bool
    ``[B, T]``) calls missing counts as zeros. The result is a channels-last view of the convolution's output.
    """
    batch, frames = pixels.shape[:2]
    images = pixels[:, :, :3]
    images = (normalise(images) if images.dtype == torch.uint8 else images).to(weight.dtype)
    if present is not None:
        images = images.masked_fill(~present[:, :, None, None, None], 0.0)
    patches = F.conv2d(images.flatten(0, 1), weight, stride=weight.shape[-1])
    return patches.unflatten(0, (batch, frames)).permute(0, 1, 3, 4, 2)
