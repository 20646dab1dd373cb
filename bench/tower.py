"""The whole tower as the benchmarks run it: its inputs, its contenders with equal weights, and what it must cost."""
from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import python_ref
from bench.peers import VectorisedSTAB, compiled
from panda_kernels.nn import STAB, Projector, VisualPath
from panda_kernels.spec import Cost, Draw, Tolerance, relative_error
from panda_kernels.verify import seeded_tower

from .half_products import peer_dtype, peer_name, yardstick
from .machine import free_bytes
from .measure import Call, Errors, overhead
from .records import OURS

DIM, PROJECTED, PATCH, WINDOW, HEADS = 1024, 4096, 14, 2, 8
FP8_LIMIT = 0.066  # a tenth more than docs/numerics.md has for tower and projector
Rectangle = tuple[int, int, int, int]
SQUARE: Rectangle = (0, 32, 0, 32)
WIDESCREEN: Rectangle = (6, 24, 0, 32)  # 1280 x 720 fitted into 448 x 448
Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """Clips of ``frames`` frames of 448 x 448 pixels, valid in the same rectangle of patches."""

    clips: int
    frames: int = 4
    rectangle: Rectangle = SQUARE

    @property
    def distinct(self) -> Case:
        """What differs: larger batches repeat two clips, which do not depend on each other; longer clips 8 frames."""
        return replace(self, clips=min(self.clips, 2), frames=min(self.frames, 8))

    def pixel_values(self, dtype: torch.dtype) -> Tensor:
        """``[clips, frames, 4, 448, 448]``, the same numbers in every dtype."""
        size = SQUARE[1] * PATCH
        pixels = Draw(0, dtype)(self.distinct.clips, self.distinct.frames, 4, size, size)
        row0, row1, col0, col1 = (PATCH * edge for edge in self.rectangle)
        pixels[:, :, 3] = 0
        pixels[:, :, 3, row0:row1, col0:col1] = 1
        if self.frames > self.distinct.frames:
            pixels = pixels[:, torch.arange(self.frames) % self.distinct.frames]
        return pixels[torch.arange(self.clips) % 2] if self.clips > 1 else pixels

    def fits(self, device: str, training: bool = False) -> bool:
        """Whether memory is there: twice the 50 MiB a frame that peers need in float32, or 100 in training."""
        return self.clips * self.frames * (200 if training else 100) * 2**20 < free_bytes(device)


CASES = {
    "8 frames": Case(2),
    "720p clip": Case(1, rectangle=WIDESCREEN),
    "image": Case(1, frames=1),
    "1 clip": Case(1),
    **{f"{clips} clips": Case(clips) for clips in (4, 8, 16, 32, 64)},
}
SHORT = ("8 frames", "720p clip", "image")


@dataclass(frozen=True)
class Contenders:
    """Ours and the peers with the same weights, each from pixels and mask to packed tokens.

    The peers may have another dtype than ours, and names that say so.
    """

    dtype: torch.dtype
    device: str
    ours: Run
    peers: dict[str, Run]

    def calls(self, pixels: Tensor) -> tuple[Call, dict[str, Call]]:
        """Ours and the peers on these pixels, each given them in its own dtype."""
        ours = pixels.to(self.device, self.dtype)
        theirs = ours.to(peer_dtype(self.dtype, self.device))
        return partial(self.ours, ours), {name: partial(run, theirs) for name, run in self.peers.items()}

    def overheads(self) -> dict[str, float]:
        """Of a call on an image of one window."""
        ours, peers = self.calls(torch.ones(1, 1, 4, WINDOW * PATCH, WINDOW * PATCH))
        return {name: overhead(call) for name, call in {**peers, OURS: ours}.items()}


def contenders(dtype: torch.dtype, *, device: str, projected: bool = False, with_compiled: bool = False) -> Contenders:
    """The contenders of one dtype; ``projected`` adds the projector to each."""
    reference, head = reference_modules(peer_dtype(dtype, device), device)
    tower, projector = our_modules(dtype, device)
    modules = head if projected else identity
    peers = {"reference": packed(reference, modules), "vectorised": packed(VectorisedSTAB(reference), modules)}
    if with_compiled:
        peers["compiled"] = packed(compiled(reference), modules)
    return Contenders(dtype, device, _tokens_of(VisualPath(tower, projector if projected else None)),
                      {peer_name(name, dtype, device): run for name, run in peers.items()})


def packed_bytes(dtype: torch.dtype) -> int:
    """Of a clip's weights as the compiled core wants them, kept between calls."""
    tower, _ = our_modules(dtype, "cpu")
    constants: Any = tower.constants()
    return sum(weight.nbytes for weight in constants.clips)


def by_fp8(device: str) -> Contenders:
    """Tower and projector with their products in FP8 beside the same in bfloat16."""
    dtype = torch.bfloat16
    fp8_path, native_path = (VisualPath(*our_modules(dtype, device, *products)) for products in (("fp8",), ()))
    return Contenders(dtype, device, _tokens_of(fp8_path), {"ours, bfloat16": _tokens_of(native_path)})


def _tokens_of(path: VisualPath) -> Run:
    return lambda pixel_values: path(pixel_values).tokens


def errors(case: Case, contest: Contenders, projected: bool) -> Errors:
    """Ours and the reference in the contest's dtype against the reference in float64: the worst pair of clips.

    Of a clip longer than 8 frames the windows of the first 4, which do not see beyond the 6th, are compared.
    """
    exact = exact_tokens(case.distinct, projected)
    reference = _reference_error(case.distinct, contest.dtype, projected, contest.device)
    with torch.inference_mode():
        tokens = contest.ours(case.pixel_values(contest.dtype).to(contest.device)).cpu()
    if case.frames > case.distinct.frames:
        ours, wanted = (frames.unflatten(0, (-1, len(exact) // 8))[:4, 1:] for frames in (tokens, exact))
        worst = relative_error(ours, wanted)
    else:
        pairs = tokens.split(len(tokens) // case.clips * case.distinct.clips)
        worst = max(relative_error(pair, exact[: len(pair)]) for pair in pairs)
    return Errors(worst, reference, Tolerance().limit(reference, contest.dtype))


def cost(case: Case, dtype: torch.dtype, projected: bool, *, dim: int = DIM) -> Cost:
    """The least arithmetic known, with the identities of SPEC ("The same function, cheaper"), and each byte once.

    Small terms (norms, softmax, work once a clip or a frame, or on weights alone) are left out.
    """
    row0, row1, col0, col1 = case.rectangle
    k = 3 * PATCH**2
    grid = ((row1 - row0) // WINDOW, (col1 - col0) // WINDOW)
    frames = case.clips * case.frames
    windows, tokens = frames * grid[0] * grid[1], frames * (1 + grid[0] * (grid[1] + 1))
    reduced = int(dim / 1.5)
    if case.frames > 1:
        patches = frames * SQUARE[1] * SQUARE[3]
        multiply_adds = _of_patches(patches, dim)
        multiply_adds += patches * (dim * reduced + 3 * reduced + 27 * dim + 2 * HEADS * dim)
        multiply_adds += windows * (4 * dim**2 + 2 * HEADS * dim)
        weights = dim * k + 2 * dim * reduced + 27 * dim + 21 * dim**2
    else:  # LSD meets the patches, and the triangle each patch's length
        multiply_adds = windows * (WINDOW**2 * k**2 // 2 + 4 * dim * k + dim**2 + 2 * HEADS * k)
        weights = k**2 // 2 + 4 * dim * k + 5 * dim**2
    if projected:
        multiply_adds += tokens * (dim * PROJECTED + PROJECTED**2)
        weights += dim * PROJECTED + PROJECTED**2
    pixels = k * frames * SQUARE[1] * SQUARE[3]
    numbers = pixels + weights + tokens * (PROJECTED if projected else dim)
    return Cost(bytes=numbers * dtype.itemsize, flops=2 * multiply_adds)


def _of_patches(patches: int, dim: int) -> int:
    """Multiply-adds from a clip's pixels to the embedding and LSTE's bottleneck."""
    return patches * 3 * PATCH**2 * (dim + int(dim / 1.5))


def training_cost(case: Case, dtype: torch.dtype) -> Cost:
    """A gradient is two products for each of the forward's, but for those of the pixels, which have none."""
    forward = cost(case, dtype, False)
    patches = case.clips * case.frames * SQUARE[1] * SQUARE[3]
    return Cost(bytes=3 * forward.bytes, flops=3 * forward.flops - 2 * _of_patches(patches, DIM))


@functools.cache
def weights() -> tuple[python_ref.STAB, python_ref.Projector]:
    head = python_ref.Projector(DIM, PROJECTED).double().requires_grad_(False)
    draw = Draw(1, torch.float64)
    for parameter in head.parameters():
        parameter.copy_(draw(*parameter.shape, scale=0.1 if parameter.ndim == 1 else parameter.shape[1] ** -0.5))
    return seeded_tower(DIM), head


@functools.cache
def reference_modules(dtype: torch.dtype, device: str) -> tuple[python_ref.STAB, python_ref.Projector]:
    tower, head = python_ref.STAB(DIM).to(dtype).eval(), python_ref.Projector(DIM, PROJECTED).to(dtype)
    for module, source in zip((tower, head), weights(), strict=True):
        module.to(device).load_state_dict(source.state_dict())
    return tower, head


@functools.cache
def our_modules(dtype: torch.dtype, device: str, products: str = "native") -> tuple[STAB, Projector]:
    tower, head = STAB(DIM).to(dtype).eval(), Projector(DIM, PROJECTED).to(dtype).eval()
    tower.products = head.products = products
    for module, source in zip((tower, head), weights(), strict=True):
        module.to(device).load_state_dict(source.state_dict())
    return tower, head


@functools.cache
def exact_tokens(case: Case, projected: bool) -> Tensor:
    tower, head = weights()
    with torch.inference_mode():
        if projected:
            return head(exact_tokens(case, False))
        return packed(tower, identity)(case.pixel_values(torch.float64))


@functools.cache
def _reference_error(case: Case, dtype: torch.dtype, projected: bool, device: str) -> float:
    tower, head = reference_modules(dtype, device)
    run = packed(tower, head if projected else identity)
    with torch.no_grad(), yardstick(dtype, device):
        tokens = run(case.pixel_values(dtype).to(device))
    return relative_error(tokens.cpu(), exact_tokens(case, projected))


def identity(tokens: Tensor) -> Tensor:
    return tokens


def packed(peer: Callable[..., tuple[Sequence[Tensor], Sequence[Tensor]]],
           modules: Callable[[Tensor], Tensor]) -> Run:
    return lambda pixel_values: torch.cat(list(peer(pixel_values, modules)[0]))
