"""The class tokens by csrc/cuda/class_tokens.cu: all that follows the two global poolings, in one launch."""
from __future__ import annotations

import torch
from torch import Tensor

from . import aligned


def prepare(clip: tuple[Tensor, ...], mlp: tuple[Tensor, ...], frame: tuple[Tensor, ...],
            fusion: tuple[Tensor, ...]) -> list[Tensor]:
    """The weights as they are, in the kernel's order; arguments as of ``stab_tower.prepare``."""
    return [aligned(w) for w in (frame[0].flatten(), *frame[1:], clip[0].flatten(), *clip[1:], *mlp, *fusion)]


def run(weights: list[Tensor], eps: float, clip_pooled: Tensor | None, frame_pooled: Tensor) -> Tensor:
    """``[B, n, C]`` of the clips (None for images), ``[B * T, n, C]`` of the frames -> ``[B * T, C]``, in one dtype."""
    rows, channels = len(frame_pooled), frame_pooled.shape[-1]
    clips = rows if clip_pooled is None else len(clip_pooled)
    frames = rows // clips
    numbers = torch.ops.panda_kernels_cuda.class_tokens_workspace(clips, frames, channels)
    workspace = torch.empty(numbers, dtype=torch.float32, device=frame_pooled.device)
    y = torch.empty(rows, channels, dtype=frame_pooled.dtype, device=frame_pooled.device)
    torch.ops.panda_kernels_cuda.class_tokens(clip_pooled, frame_pooled, weights if frames > 1 else weights[:7], frames,
                                              eps, y, workspace)
    return y
