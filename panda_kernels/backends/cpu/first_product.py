"""LSTE's product down, the norm in its weight ``[R, C]``, of the tokens or of the pixels they were embedded from.

Both write the bottleneck of some clips, and take back its gradient clip by clip; channels of zeros fill the last panel.
"""
from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..torch.patch_embed import composed
from ._arrays import pack, product, weight_gradient
from .patch_embed import add_gradient, embed
from .patch_embed import bwd as embedding_bwd

Gradients = tuple[Tensor, Tensor, list[Tensor | None]]


class OfTokens:
    def __init__(self, tokens: Tensor, weight: Tensor, bias: Tensor) -> None:
        self.tokens, self.weight, self.bias = tokens, weight, bias
        self._sums: tuple[Tensor, Tensor] | None = None

    @functools.cached_property
    def _packed(self) -> Tensor:
        return pack(self.weight, self.tokens.dtype)

    @functools.cached_property
    def _back(self) -> Tensor:
        return pack(self.weight, self.tokens.dtype, transposed=True)

    def write(self, clips: slice, inner: Tensor) -> Tensor:
        product(rows(self.tokens[clips]), self._packed, inner.shape[-1], bias=self.bias, out=rows(inner))
        return inner

    def take_back(self, clips: slice, grad: Tensor, grad_tokens: Tensor) -> None:
        """From the gradient of a bottleneck what it adds to that of the tokens."""
        tokens = rows(grad_tokens)
        product(rows(grad), self._back, tokens.shape[-1], residual=tokens, out=tokens)
        self._sums = weight_gradient(rows(grad), rows(self.tokens[clips]), self._sums)

    def gradients(self) -> Gradients:
        """``grad^T tokens`` and the sum of ``grad`` over all that was taken back, and what else has a gradient."""
        assert self._sums is not None
        return *self._sums, []


class OfPixels:
    """Composed with the embedding, so that nothing of it goes back through the tokens."""

    def __init__(self, pixels: Tensor, embedding: Tensor, present: Tensor | None, weight: Tensor, bias: Tensor,
                 dtype: torch.dtype, *, needs_pixels: bool = False) -> None:
        self.pixels, self.embedding, self.present = pixels, embedding, present
        self.weight, self.bias, self.dtype = weight, bias, dtype
        self._sums: tuple[Tensor, Tensor] | None = None
        self._grad_pixels = torch.empty_like(pixels) if needs_pixels else None

    @functools.cached_property
    def _composed(self) -> Tensor:
        return composed(self.weight, self.embedding).to(self.dtype)

    @functools.cached_property
    def _packed(self) -> Tensor:
        return pack(self._composed.flatten(1), self.dtype)

    def _frames(self, clips: slice) -> tuple[Tensor, Tensor | None]:
        return self.pixels[clips], None if self.present is None else self.present[clips]

    def write(self, clips: slice, inner: Tensor) -> Tensor:
        pixels, present = self._frames(clips)
        embed(pixels, self._packed, self.bias, present, self.embedding.shape[-1], inner)
        return inner

    def take_back(self, clips: slice, grad: Tensor, grad_tokens: Tensor) -> None:
        pixels, present = self._frames(clips)
        self._sums = add_gradient(grad, pixels, present, self.embedding.shape[-1], self._sums)
        if self._grad_pixels is not None:
            found, _ = embedding_bwd(grad, pixels, self._composed, present, needs=[True, False])
            assert found is not None
            self._grad_pixels[clips] = found

    def gradients(self) -> Gradients:
        assert self._sums is not None
        moments, sums = self._sums
        of_embedding = (self.weight.T @ moments).view(self.embedding.shape)
        return (moments @ self.embedding.flatten(1).float().T, sums,
                [self._grad_pixels, of_embedding.to(self.embedding.dtype)])


def first_product(x: Tensor, source: tuple[Tensor | None, ...], weight: Tensor, bias: Tensor, *,
                  needs_pixels: bool = False) -> OfTokens | OfPixels:
    pixels, embedding, present = source
    if pixels is None or embedding is None:
        return OfTokens(x, weight, bias)
    return OfPixels(pixels, embedding, present, weight, bias, x.dtype, needs_pixels=needs_pixels)


def rows(grid: Tensor) -> Tensor:
    return grid.view(-1, grid.shape[-1])
