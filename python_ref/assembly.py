"""Stage 9, assembly: a frame's token, then the rows of its window tokens, each closed by the split token."""

from __future__ import annotations

import torch
from torch import Tensor


def assemble(y: Tensor, f: Tensor, split: Tensor) -> Tensor:
    """Windows ``[h', w', C]``, frame token ``[C]``, split token ``[C]`` -> ``[1 + h' * (w' + 1), C]``."""
    rows = torch.cat([y, split.expand(y.shape[0], 1, -1)], dim=1)
    return torch.cat([f[None], rows.flatten(0, 1)])


def assemble_tokens(
    y: Tensor, f: Tensor, split: Tensor, corners: Tensor, num_tokens: int, *, window: int = 2
) -> Tensor:
    """All frames, packed: windows ``[num_windows, C]``, frame tokens ``[frames, C]`` -> ``[num_tokens, C]``.

    ``corners [frames, 4]`` are row0, row1, col0, col1 in patches. Raises ValueError if they hold other counts.
    """
    grids = [((r1 - r0) // window, (c1 - c0) // window) for r0, r1, c0, c1 in corners.tolist()]
    frames = y.split([h * w for h, w in grids])
    tokens = torch.cat([assemble(yi.unflatten(0, hw), fi, split) for yi, fi, hw in zip(frames, f, grids, strict=True)])
    if len(tokens) != num_tokens:
        raise ValueError(f"assemble_tokens: the corners hold {len(tokens)} tokens, num_tokens says {num_tokens}")
    return tokens
