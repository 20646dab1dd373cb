"""Patches extracted band by band, normalised on the way, and multiplied while they are in the caches."""
from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...tuning import Space
from ..torch.patch_embed import CLIP_MEAN, CLIP_STD, missing_frames, whole_patches
from . import refusals  # noqa: F401
from ._arrays import array, compute_dtype, kernels, pack, product, result
from ._tuning import tune

SPACE = Space("cpu.patch_embed", band_tokens=(256, 512, 1024, 2048), product_rows=(128, 256, 512, 1024))


@functools.cache
def normalisation() -> Tensor:
    """Scale and shift of the three channels that turn a byte into a normalised pixel, ``[6]`` float32."""
    mean, std = torch.tensor(CLIP_MEAN, dtype=torch.float64), torch.tensor(CLIP_STD, dtype=torch.float64)
    return torch.cat([1 / (255 * std), -mean / std]).float()


def readable(pixels: Tensor) -> Tensor:
    """Pixels of a type the kernels read through their strides; float16 and float64 are copied to float32."""
    return pixels if pixels.dtype in (torch.uint8, torch.float32, torch.bfloat16) else pixels.float()


def embed(pixels: Tensor, packed: Tensor, bias: Tensor | None, present: Tensor | None, patch: int, y: Tensor) -> None:
    kernels.patch_embed(readable(pixels), None if present is None else present.contiguous(), normalisation(), patch,
                        packed, bias, y)


def add_gradient(grad: Tensor, pixels: Tensor, present: Tensor | None, patch: int,
                 sums: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """The float32 gradients ``[C, 3 p^2]`` and ``[C]`` of a weight and a bias, added to ``sums``, if there are any."""
    weight, bias = sums or (torch.empty(grad.shape[-1], 3 * patch**2), torch.empty(grad.shape[-1]))
    kernels.patch_embed_gradient(grad, readable(pixels), None if present is None else present.contiguous(),
                                 normalisation(), patch, sums is not None, weight, bias)
    return weight, bias


def fwd(pixels: Tensor, weight: Tensor, present: Tensor | None) -> Tensor:
    batch, frames, _, height, width = pixels.shape
    channels, _, patch, _ = weight.shape
    dtype = compute_dtype(weight.dtype)
    y = result(batch, frames, height // patch, width // patch, channels, dtype=dtype)
    tune(SPACE, y, C=channels, patch=patch, direction="fwd")
    embed(pixels, pack(weight.flatten(1), dtype), None, present, patch, y)
    return y.to(weight.dtype)


def bwd(grad: Tensor, pixels: Tensor, weight: Tensor, present: Tensor | None, *,
        needs: list[bool]) -> list[Tensor | None]:
    grad_pixels = grad_weight = None
    grads, dtype, values = array(grad), compute_dtype(weight.dtype), weight[0].numel()
    tune(SPACE, grads, C=len(weight), patch=weight.shape[-1], direction="bwd")
    if needs[0]:
        back = pack(weight.flatten(1), dtype, transposed=True)
        patches = product(grads.view(-1, grads.shape[-1]), back, values).view(*grad.shape[:-1], *weight.shape[1:])
        if present is not None:
            patches = patches.masked_fill(missing_frames(present), 0.0)
        grad_pixels = pixels.new_zeros(pixels.shape)
        whole_patches(grad_pixels, weight).copy_(patches)
    if needs[1]:
        sums, _ = add_gradient(grads, pixels, present, weight.shape[-1])
        grad_weight = sums.view(weight.shape).to(weight.dtype)
    return [grad_pixels, grad_weight]
