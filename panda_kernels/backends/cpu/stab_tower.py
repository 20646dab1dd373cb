"""The whole tower in one call, for inference: clips streamed through the caches (csrc/core/clips.cpp), images from
patches straight to windows (csrc/core/images.cpp)."""
from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ...rectangles import Rectangles
from ...tuning import Space
from . import class_tokens, refusals  # noqa: F401
from ._arrays import added_by, compute_dtype, floats, kernels, pack, precise_product, result, scale_columns
from ._tuning import DEFAULT, Tuning, tune
from .class_tokens import FusionWeights, MLPWeights, ValueWeights
from .local_encoding import streamed_weights
from .patch_embed import normalisation, readable
from .window_attention_pool import window_weights

SPACE = Space("cpu.stab_tower", band_tokens=(256, 384, 512, 1024, 2048), product_rows=(256, 512, 1024),
              block_windows=(32, 64, 128))
# Of clips in float32, whose rows weigh twice as much: 4 MiB less than with 512, and no slower.
FLOAT_BANDS = Tuning(band_tokens=384)
TRIANGLE_ROWS = 128  # packed together, as in csrc/core/images.h


@dataclass(frozen=True, eq=False)
class Streamed:
    """A tower, its weights folded and packed once a clip or an image wants them, in the order of csrc/bindings.cpp.

    ``embedding [C, K]``; ``local`` are the arguments of ``local_encoding`` after x, ``windows`` those of
    ``window_attention_pool`` from ``q_norm_weight`` to ``bp``; the queries are ``[n, C]``, folded.
    """

    embedding: Tensor
    local: tuple[Tensor, ...]
    clip_queries: Tensor
    windows: tuple[Tensor, ...]
    frame_queries: Tensor
    split: Tensor
    class_tokens: class_tokens.ClassTokens
    patch: int
    num_heads: int
    window: int
    eps: float

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(self.split.dtype)

    @property
    def reduced(self) -> int:
        return len(self.local[2])

    @functools.cached_property
    @torch.no_grad()
    def clips(self) -> list[Tensor]:
        """LSTE's first product is composed with the embedding, so that one read of the pixels gives both."""
        norm_scale, norm_shift, w1, b1, *after = self.local
        squeeze = pack(precise_product(scale_columns(w1, norm_scale), self.embedding), self.dtype)
        squeeze_bias = added_by(norm_shift, w1) + b1.float()
        return [*self._of_frames(None), pack(self.embedding, self.dtype), squeeze, squeeze_bias,
                *streamed_weights(self.dtype, *after), floats(self.clip_queries)]

    @functools.cached_property
    @torch.no_grad()
    def images(self) -> list[Tensor]:
        """With R of the embedding's QR in steps, each from the column on in which its first row begins."""
        centred = self.embedding.double()
        centred = centred - centred.mean(0)
        triangle = torch.linalg.qr(centred, mode="r").R.float()
        steps = [pack(rows[:, i * TRIANGLE_ROWS:].contiguous(), self.dtype)
                 for i, rows in enumerate(triangle.split(TRIANGLE_ROWS))]
        return [*self._of_frames(centred), pack(self.embedding, self.dtype), *steps]

    def _of_frames(self, embedding: Tensor | None) -> list[Tensor]:
        windows = window_weights(self.dtype, *self.windows, num_heads=self.num_heads, scale=len(self.split)**-0.5,
                                 embedding=embedding)
        return [*windows, floats(self.frame_queries), self.split.to(self.dtype).contiguous()]


def prepare(patch_weight: Tensor, local: tuple[Tensor, ...], clip_queries: Tensor, windows: tuple[Tensor, ...],
            frame_queries: Tensor, split: Tensor, clip_values: tuple[Tensor, ...], mlp: tuple[Tensor, ...],
            frame_values: tuple[Tensor, ...], fusion: tuple[Tensor, ...], *, num_heads: int, window: int,
            eps: float) -> Streamed:
    """As in :class:`Streamed`; the last four tuples are the arguments of ``class_tokens``."""
    last = class_tokens.prepare(ValueWeights(*clip_values), MLPWeights(*mlp), ValueWeights(*frame_values),
                                FusionWeights(*fusion), clip_heads=len(clip_queries), frame_heads=len(frame_queries),
                                eps=eps)
    return Streamed(patch_weight.flatten(1), local, clip_queries, windows, frame_queries, split, last,
                    patch_weight.shape[3], num_heads, window, eps)


def run(tower: Streamed, pixels: Tensor, rectangles: Rectangles,
        present: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels ``[B, T, 3 or 4, H, W]`` -> packed tokens in the dtype of computation, ``cu_seqlens`` and ``grid``."""
    clips, frames = pixels.shape[:2]
    channels = len(tower.split)
    tokens = result(rectangles.num_tokens, channels, dtype=tower.dtype)
    clip_pooled = torch.empty(clips if frames > 1 else 0, *tower.clip_queries.shape)
    frame_pooled = torch.empty(clips * frames, *tower.frame_queries.shape)
    heuristic = FLOAT_BANDS if frames > 1 and tower.dtype == torch.float32 else DEFAULT
    tune(SPACE, tokens, heuristic, C=channels, R=tower.reduced, heads=tower.num_heads, patch=tower.patch,
         window=tower.window)
    given = (readable(pixels), None if present is None else present.contiguous(), normalisation(),
             rectangles.corners.contiguous())
    sizes = tower.num_heads, tower.window, tower.eps
    if frames > 1:
        kernels.stab_clips(*given, tower.clips, tower.patch, tower.reduced, *sizes, tokens, clip_pooled, frame_pooled)
    else:
        kernels.stab_images(*given, tower.images, tower.patch, *sizes, tokens, frame_pooled)
    last = class_tokens.run(tower.class_tokens, clip_pooled, frame_pooled)
    cu_seqlens = rectangles.cu_seqlens(tower.window)
    tokens[cu_seqlens[:-1]] = last.to(tower.dtype)
    return tokens, cu_seqlens, rectangles.grid(tower.window)
