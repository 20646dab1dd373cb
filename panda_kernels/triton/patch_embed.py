"""Patch embedding around the vendor's product: patches laid out as rows of a matrix, and their gradient put back.

The op's floor for 8 frames of 448 in bfloat16 is 28 MB (8 us on an H100) and 10 G operations (16 us at the 620 TFLOP/s
that products reach). Two designs, by model. One kernel that gathers its operand while it multiplies writes no patches,
but a run of 14 pixels begins at any even address: 2 or 4 bytes a load, normalised in registers, so that no asynchronous
copy can bring them, and every tile of 256 channels gathers them anew, four times for 1024. Products fed like this
reach about half of the speed: over 30 us. Extraction reads and writes 10 MB each, 6 us, and the product, plain and
aligned, finds them in L2: together 24 us. So these kernels extract, with bytes normalised on the way, and torch
multiplies, in whichever precision it is set to.

One side of the permutation has runs of P elements; it is the stores' in both kernels, for which nobody waits, and loads
have 16 bytes. Rows of patches are padded with zeros to whole 16 bytes (588 bfloat16 to 592), or the product would
fall back to kernels for unaligned operands. Patches do not overlap: a gradient is written, never added.
"""
from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuning import Space, choose
from ._launch import Config, cdiv, launch, next_power_of_2


@dataclass(frozen=True, kw_only=True)
class ImageTile(Config):
    """Image rows of one row of patches, in each plane, by pixels."""

    rows: int
    block_x: int


@dataclass(frozen=True, kw_only=True)
class PatchTile(Config):
    """Patches of one row, by their elements."""

    block_w: int
    block_k: int


EXTRACT = Space("triton.patch_embed.extract", block_x=(32, 64, 128, 256), threads=(64, 128, 256))
PUT_BACK = Space("triton.patch_embed.put_back", block_w=(16, 32, 64), block_k=(64, 128, 256), threads=(128, 256))


@triton.jit(do_not_specialize=["T", "h", "w", "width", "clip_stride", "frame_stride", "plane_stride", "row_stride"])
def extract(pixels, present, patches, T, h, w, width, clip_stride, frame_stride, plane_stride, row_stride,
            P: tl.constexpr, LENGTH: tl.constexpr, MEAN: tl.constexpr, STD: tl.constexpr, ALIGN: tl.constexpr,
            ROWS: tl.constexpr, BLOCK_X: tl.constexpr):
    """``patches[B * T * h * w, LENGTH]`` of ``pixels[B, T, planes, H, width]``, normalised if there is a ``MEAN``.

    Strides and ``width`` are in units of ALIGN elements, which tells the compiler how far loads are aligned.
    """
    x_tiles = tl.cdiv(w * P, BLOCK_X)
    frame = (tl.program_id(0) // x_tiles // h).to(tl.int64)
    i = tl.program_id(0) // x_tiles % h
    x = tl.program_id(0) % x_tiles * BLOCK_X + tl.arange(0, BLOCK_X)[None, :]
    dy = tl.arange(0, ROWS)[:, None]
    # Up to the image's end, not the last whole patch's: the mask would cut the loads down to what divides P.
    inside = (dy < P) & (x < width * ALIGN)
    if present is not None:
        inside &= tl.load(present + frame)
    source = frame // T * clip_stride + frame % T * frame_stride + (i * P + dy).to(tl.int64) * row_stride
    plane = pixels + source * ALIGN + x
    values = ()
    for c in tl.static_range(3):
        value = tl.load(plane + c * plane_stride.to(tl.int64) * ALIGN, mask=inside, other=0)
        if MEAN is not None:
            value = tl.where(inside, (value.to(tl.float32) - 255 * MEAN[c]) * (1 / (255 * STD[c])), 0.0)
        values += (value.to(patches.dtype.element_ty),)
    row = patches + (frame * h + i) * w * LENGTH
    for c in tl.static_range(3):
        # Behind the last plane's P rows of pixels come zeros: the padding.
        k = c * P * P + dy * P + x % P
        known = (k < (LENGTH if c == 2 else (c + 1) * P * P)) & (x < w * P)
        tl.store(row + (x // P * LENGTH + k), values[c], mask=known)


@triton.jit(do_not_specialize=["h", "w", "planes", "height", "width"])
def put_back(patches, present, pixels, h, w, planes, height, width, P: tl.constexpr, LENGTH: tl.constexpr,
             ALIGN: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr):
    """``patches[frames * h * w, LENGTH]`` to their places in ``pixels[frames, planes, height, width * ALIGN]``."""
    K_TILES: tl.constexpr = (3 * P * P + BLOCK_K - 1) // BLOCK_K
    k = tl.program_id(0) % K_TILES * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    w_tiles = tl.cdiv(w, BLOCK_W)
    j = tl.program_id(0) // K_TILES % w_tiles * BLOCK_W + tl.arange(0, BLOCK_W)[:, None]
    i = tl.program_id(0) // K_TILES // w_tiles % h
    frame = (tl.program_id(0) // K_TILES // w_tiles // h).to(tl.int64)
    value = tl.load(patches + (frame * h + i) * w * LENGTH + (j * LENGTH + k), mask=(j < w) & (k < LENGTH), other=0.0)
    if present is not None:
        value = tl.where(tl.load(present + frame), value, 0.0)
    image = pixels + (frame * planes * height + i * P) * width * ALIGN
    row = (k // (P * P)).to(tl.int64) * height + k // P % P
    tl.store(image + row * width * ALIGN + (j * P + k % P), value.to(pixels.dtype.element_ty),
             mask=(j < w) & (k < 3 * P * P))


def row_length(patch: int, dtype: torch.dtype) -> int:
    """Elements of a patch, and of the padding that makes them whole 16 bytes."""
    return cdiv(3 * patch**2 * dtype.itemsize, 16) * 16 // dtype.itemsize


def extract_patches(pixels: Tensor, patch: int, dtype: torch.dtype, present: Tensor | None,
                    mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> Tensor:
    """``[B * T * h * w, row_length]`` in ``dtype`` from ``[B, T, planes, H, W]`` whose pixels adjoin in rows."""
    B, T, _, H, W = pixels.shape
    h, w, length = H // patch, W // patch, row_length(patch, dtype)
    patches = torch.empty(B * T * h * w, length, dtype=dtype, device=pixels.device)
    rows = next_power_of_2(cdiv(length - 2 * patch**2, patch))
    config = choose(EXTRACT, ImageTile(rows=rows, block_x=128 // pixels.element_size()), pixels, patch=patch,
                    to=str(dtype))
    align = gcd(16 // pixels.element_size(), W, *pixels.stride()[:4])
    strides = {f"{name}_stride": stride // align
               for name, stride in zip(("clip", "frame", "plane", "row"), pixels.stride()[:4], strict=True)}
    launch(extract, B * T * h * cdiv(w * patch, config.block_x), config, pixels=pixels, present=present,
           patches=patches, T=T, h=h, w=w, width=W // align, P=patch, LENGTH=length, MEAN=mean, STD=std, ALIGN=align,
           **strides)
    return patches


def put_patches_back(patches: Tensor, pixels: Tensor, patch: int, present: Tensor | None) -> Tensor:
    """Contiguous ``[tokens, row_length]`` as a tensor like ``pixels[B, T, planes, H, W]``, zero where none was read."""
    B, T, planes, H, W = pixels.shape
    h, w = H // patch, W // patch
    image = torch.empty(pixels.shape, dtype=pixels.dtype, device=pixels.device)
    for unread in (image[:, :, 3:], image[:, :, :3, h * patch:], image[:, :, :3, :h * patch, w * patch:]):
        unread.zero_()
    config = choose(PUT_BACK, PatchTile(block_w=32, block_k=256 // patches.element_size()), patches, patch=patch)
    align = gcd(16 // image.element_size(), W)
    grid = B * T * h * cdiv(w, config.block_w) * cdiv(3 * patch**2, config.block_k)
    launch(put_back, grid, config, patches=patches, present=present, pixels=image, h=h, w=w, planes=planes, height=H,
           width=W // align, P=patch, LENGTH=patches.shape[1], ALIGN=align)
    return image
