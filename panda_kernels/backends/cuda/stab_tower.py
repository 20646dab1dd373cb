"""The tower of the triton backend with the kernels of csrc/cuda where they serve: the stencil, LSD's attention, and the
class tokens in one launch."""
from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from .. import cuda, triton
from ..triton import stab_tower
from ..triton.stab_tower import Prepared, by_fp8, run  # noqa: F401
from . import class_tokens, window_attention_pool
from .depthwise_conv3d import convolve_and_add


def refusals(inputs: Sequence[Any]) -> list[str]:
    """Besides the backend's: channels that do not fill vectors of 16 bytes. ``inputs`` is one tensor of C channels."""
    if error := triton.load_error():
        return [f"triton: {error}"]
    [weight] = inputs
    return cuda.refusals(inputs) + cuda.partial_vectors(weight)


def prepare(patch_weight: Tensor, local: tuple[Tensor, ...], clip_queries: Tensor, windows: tuple[Tensor, ...],
            frame_queries: Tensor, split: Tensor, clip_values: tuple[Tensor, ...], mlp: tuple[Tensor, ...],
            frame_values: tuple[Tensor, ...], fusion: tuple[Tensor, ...], *, num_heads: int, window: int,
            eps: float) -> Prepared:
    """Fold a tower; the arguments are those of the cpu backend."""
    tower = stab_tower.prepare(patch_weight, local, clip_queries, windows, frame_queries, split, clip_values, mlp,
                               frame_values, fusion, num_heads=num_heads, window=window, eps=eps)
    pool: Any = tower.window_pool
    if not window_attention_pool.unserved(split.dtype, split.shape[-1], num_heads, window):
        pool = partial(window_attention_pool.fwd, **pool.keywords)
    tail = partial(class_tokens.run, class_tokens.prepare(clip_values, mlp, frame_values, fusion), eps)
    return tower._replace(window_pool=pool, pooled=split.dtype, class_tokens=tail,
                          encoding=tower.encoding._replace(convolve_and_add=convolve_and_add))
