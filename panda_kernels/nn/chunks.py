"""A video goes through the tower in chunks that do not see one another."""
from __future__ import annotations

from torch import Tensor

from ..checks import Checks


def split_chunks(pixels: Tensor, chunk: int = 4) -> Tensor:
    """Whole videos, any tensor ``[V, T_all, ...]`` -> the tower's batch ``[V * T_all / chunk, chunk, ...]``, in order.

    Raises:
        ValueError: fewer than two dimensions, ``chunk`` below 1, or ``T_all`` not a positive multiple of ``chunk``.

    Source: SPEC, "a video of ``T_all`` frames"; preprocessing pads a video to 8 frames.
    """
    check = Checks("split_chunks")
    if pixels.ndim < 2:
        check.fail("pixels", "shape [V, T_all, ...]", list(pixels.shape))
    if chunk < 1:
        check.fail("chunk", "at least 1 frame", chunk)
    frames = pixels.shape[1]
    if frames == 0 or frames % chunk:
        check.fail("pixels", f"a number of frames that is a multiple of {chunk} (preprocessing pads)", frames)
    return pixels.unflatten(1, (frames // chunk, chunk)).flatten(0, 1)
