"""STAB, the Spatio-Temporal Alignment Block: stages 1 to 9 in the order of the paper, with the released names."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .assembly import assemble
from .crop import valid_rectangles
from .fsra import FSRA
from .fusion import fuse, fusion_projection
from .gstra import GSTRA
from .lsd import LSD
from .lste import LocalMHRA, lste, position_encoding
from .patch import patch_embed


class STAB(nn.Module):
    """The visual tower. ``dim`` is 1024, 1152 or 1408 (the last with 11 GSTRA heads) in the released models.

    Source: arXiv 2412.18609, section 3, with the released code's arithmetic where the two differ.
    """

    def __init__(
        self,
        dim: int = 1024,
        *,
        patch: int = 14,
        window: int = 2,
        num_heads: int = 8,
        gstra_heads: int | None = None,
        lste_reduction: float = 1.5,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        if gstra_heads is None:
            gstra_heads = 11 if dim == 1408 else 8
        self.patch, self.window = patch, window
        self.class_embedding = nn.Parameter(torch.randn(dim))
        self.split_embedding = nn.Parameter(torch.randn(dim))
        self.temporal_cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.balance = nn.Parameter(torch.zeros(dim))
        self.patch_embedding = nn.Conv2d(3, dim, kernel_size=patch, stride=patch, bias=False)
        self.lmhra1 = LocalMHRA(dim, lste_reduction)
        # In every checkpoint, never used.
        self.lmhra2 = LocalMHRA(dim, lste_reduction)
        self.dpe = position_encoding(dim)
        self.dec = GSTRA(dim, gstra_heads, dropout)
        self.local_attention = LSD(dim, num_heads, window)
        self.global_attention = FSRA(dim, num_heads)
        self.proj = fusion_projection(dim, dropout)

    def forward(self, pixel_values: Tensor, modules: Callable[[Tensor], Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Pixels and mask ``[B, T, 4, H, W]`` -> two lists over the frames ``b * T + t``.

        The first holds ``modules(tokens)`` of each frame's ``[1 + h' * (w' + 1), C]`` tokens, the second its
        ``LongTensor([h', w'])``. ``T = 1`` means images, which skip the temporal stages. Pixels are cast to the
        weights' dtype (uint8 ones are CLIP-normalised on the way).

        Raises ValueError if ``pixel_values`` is not ``[B, T, 4, H, W]`` or a frame's mask gives no usable rectangle.
        """
        if pixel_values.ndim != 5 or pixel_values.shape[2] != 4:
            raise ValueError(f"STAB: pixel_values has shape {tuple(pixel_values.shape)}, expected [B, T, 4, H, W]")
        frames = pixel_values.shape[1]
        weight = self.patch_embedding.weight
        x = patch_embed(pixel_values, weight).permute(0, 4, 1, 2, 3).contiguous()
        g = None
        if frames > 1:
            x, g = self.temporal(x)

        tokens, grids = [], []
        for i, (row0, row1, col0, col1) in enumerate(
            valid_rectangles(pixel_values[:, :, 3].to(weight.dtype), self.patch, self.window)
        ):
            clip, frame = divmod(i, frames)
            y = self.local_attention(x[clip, :, frame, row0:row1, col0:col1].permute(1, 2, 0))
            f = self.global_attention(self.class_embedding, y.flatten(0, 1))
            if g is not None:
                f = fuse(g[clip], f, self.balance, self.proj)
            tokens.append(modules(assemble(y, f, self.split_embedding)))
            grids.append(torch.tensor(y.shape[:2], device=y.device))
        return tokens, grids

    def temporal(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        """Stages 2 to 4 on ``x0 [B, C, T, h, w]``: ``x3`` of the same shape and the clips' global tokens ``[B, C]``."""
        x2 = lste(x0, self.lmhra1, self.dpe)
        query = self.temporal_cls_token.expand(1, len(x2), -1)
        g = self.dec(query, x2.flatten(2).permute(2, 0, 1))
        return x2 + x0, g
