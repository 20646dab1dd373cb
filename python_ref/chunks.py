"""A video goes through the tower in chunks that do not see one another."""

from __future__ import annotations

from torch import Tensor


def split_chunks(pixels: Tensor, chunk: int = 4) -> Tensor:
    """Videos ``[V, T_all, ...]`` -> ``[V * T_all / chunk, chunk, ...]``.

    Raises ValueError if the number of frames is no multiple of ``chunk``.
    """
    frames = pixels.shape[1]
    if frames % chunk:
        raise ValueError(f"split_chunks: pixels has {frames} frames, expected a multiple of {chunk}")
    return pixels.unflatten(1, (frames // chunk, chunk)).flatten(0, 1)
