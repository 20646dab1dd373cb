"""The whole tower as the benchmarks run it: its inputs, its contenders with equal weights, and what it must cost."""
from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import python_ref
from bench.peers import VectorisedSTAB, compiled
from panda_kernels.nn import STAB, Projector
from panda_kernels.spec import Cost, Draw, Tolerance, relative_error
from panda_kernels.verify import seeded_tower

from .measure import Errors

DIM, PROJECTED, PATCH, WINDOW, HEADS = 1024, 4096, 14, 2, 8
Rectangle = tuple[int, int, int, int]
SQUARE: Rectangle = (0, 32, 0, 32)
WIDESCREEN: Rectangle = (6, 24, 0, 32)  # 1280 x 720 fitted into 448 x 448


@dataclass(frozen=True)
class Case:
    """Clips of ``frames`` frames of 448 x 448 pixels, valid in the same rectangle of patches."""

    clips: int
    frames: int = 4
    rectangle: Rectangle = SQUARE

    def pixel_values(self, dtype: torch.dtype) -> Tensor:
        """``[clips, frames, 4, 448, 448]``, the same numbers in every dtype."""
        size = SQUARE[1] * PATCH
        pixels = Draw(0, dtype)(self.clips, self.frames, 4, size, size)
        row0, row1, col0, col1 = (PATCH * edge for edge in self.rectangle)
        pixels[:, :, 3] = 0
        pixels[:, :, 3, row0:row1, col0:col1] = 1
        return pixels


CASES = {
    "8 frames": Case(2),
    "720p clip": Case(1, rectangle=WIDESCREEN),
    "image": Case(1, frames=1),
    "1 clip": Case(1),
    "4 clips": Case(4),
}
SHORT = ("8 frames", "720p clip", "image")


@dataclass(frozen=True)
class Contenders:
    """Ours and the peers with the same weights, each from pixels and mask to packed tokens."""

    ours: Callable[[Tensor], Tensor]
    peers: dict[str, Callable[[Tensor], Tensor]]


def contenders(dtype: torch.dtype, *, device: str, projected: bool = False, with_compiled: bool = False) -> Contenders:
    """The contenders of one dtype; ``projected`` adds the projector to each."""
    reference, head = _reference(dtype, device)
    tower, projector = _ours(dtype, device)
    modules = head if projected else identity
    peers = {"reference": packed(reference, modules), "vectorised": packed(VectorisedSTAB(reference), modules)}
    if with_compiled:
        peers["compiled"] = packed(compiled(reference), modules)

    def ours(pixel_values: Tensor) -> Tensor:
        tokens = tower(pixel_values).tokens
        return projector(tokens) if projected else tokens

    return Contenders(ours, peers)


def errors(case: str, contest: Contenders, dtype: torch.dtype, projected: bool, device: str) -> Errors:
    """Ours and the reference in ``dtype`` against the reference in float64."""
    pixels = CASES[case].pixel_values(dtype).to(device)
    exact = _exact(case, projected)
    with torch.inference_mode():
        ours, reference = (relative_error(run(pixels).cpu(), exact)
                           for run in (contest.ours, contest.peers["reference"]))
    return Errors(ours, reference, Tolerance().limit(reference, dtype))


def cost(case: Case, dtype: torch.dtype, projected: bool, *, dim: int = DIM) -> Cost:
    """The least arithmetic known, with the identities of SPEC ("The same function, cheaper"), and each byte once.

    Small terms (norms, softmax, work once a clip or a frame) are left out.
    """
    row0, row1, col0, col1 = case.rectangle
    grid = ((row1 - row0) // WINDOW, (col1 - col0) // WINDOW)
    frames = case.clips * case.frames
    windows, tokens = frames * grid[0] * grid[1], frames * (1 + grid[0] * (grid[1] + 1))
    reduced = int(dim / 1.5)
    patches = frames * SQUARE[1] * SQUARE[3] if case.frames > 1 else frames * (row1 - row0) * (col1 - col0)
    multiply_adds = patches * dim * 3 * PATCH**2
    weights = dim * 3 * PATCH**2 + 8 * dim**2
    if case.frames > 1:
        multiply_adds += patches * (2 * dim * reduced + 3 * reduced + 27 * dim + 2 * HEADS * dim)
        weights += 2 * dim * reduced + 27 * dim + 13 * dim**2
    multiply_adds += windows * (4 * dim**2 + 2 * HEADS * dim)
    if projected:
        multiply_adds += tokens * (dim * PROJECTED + PROJECTED**2)
        weights += dim * PROJECTED + PROJECTED**2
    pixels = 3 * (PATCH**2) * frames * SQUARE[1] * SQUARE[3]
    numbers = pixels + weights + tokens * (PROJECTED if projected else dim)
    return Cost(bytes=numbers * dtype.itemsize, flops=2 * multiply_adds)


@functools.cache
def weights() -> tuple[python_ref.STAB, python_ref.Projector]:
    head = python_ref.Projector(DIM, PROJECTED).double().requires_grad_(False)
    draw = Draw(1, torch.float64)
    for parameter in head.parameters():
        parameter.copy_(draw(*parameter.shape, scale=0.1 if parameter.ndim == 1 else parameter.shape[1] ** -0.5))
    return seeded_tower(DIM), head


@functools.cache
def _reference(dtype: torch.dtype, device: str) -> tuple[python_ref.STAB, python_ref.Projector]:
    tower, head = python_ref.STAB(DIM).to(dtype).eval(), python_ref.Projector(DIM, PROJECTED).to(dtype)
    for module, source in zip((tower, head), weights(), strict=True):
        module.to(device).load_state_dict(source.state_dict())
    return tower, head


@functools.cache
def _ours(dtype: torch.dtype, device: str) -> tuple[STAB, Projector]:
    tower, head = STAB(DIM).to(dtype).eval(), Projector(DIM, PROJECTED).to(dtype)
    for module, source in zip((tower, head), weights(), strict=True):
        module.to(device).load_state_dict(source.state_dict())
    return tower, head


@functools.cache
def _exact(case: str, projected: bool) -> Tensor:
    tower, head = weights()
    if projected:
        return head(_exact(case, False))
    with torch.inference_mode():
        return packed(tower, identity)(CASES[case].pixel_values(torch.float64))


def identity(tokens: Tensor) -> Tensor:
    return tokens


def packed(peer: Callable[..., tuple[Sequence[Tensor], Sequence[Tensor]]],
            modules: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda pixel_values: torch.cat(list(peer(pixel_values, modules)[0]))
