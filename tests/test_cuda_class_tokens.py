"""csrc/cuda/class_tokens.cu on the CPU, its threads and blocks emulated: against the towers' own stages in float64."""
from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import cuda_emulated
import pytest
import torch
from torch import Tensor, nn

from panda_kernels.nn import STAB
from panda_kernels.spec import Tolerance, relative_error

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GUARD = 64
TENSORS = ("clip_pooled", "frame_pooled",
           *(f"{part}.{name}" for part in ("clip", "frame")
             for name in ("query", "norm_weight", "norm_bias", "wv", "bv", "wp", "bp")),
           *(f"mlp.{name}" for name in ("norm_weight", "norm_bias", "w1", "b1", "w2", "b2")),
           *(f"fusion.{name}" for name in ("balance", "norm_weight", "norm_bias", "w", "b")), "y")


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    cuda_emulated.library.workspace_of_class_tokens.restype = ctypes.c_int64
    return cuda_emulated.library


class Case(NamedTuple):
    clips: int
    frames: int
    c: int
    clip_heads: int = 8
    frame_heads: int = 8


def tower(case: Case) -> STAB:
    """With weights that leave no step without effect."""
    torch.manual_seed(case.c)
    stab = STAB(case.c, num_heads=case.frame_heads, gstra_heads=case.clip_heads).eval()
    with torch.no_grad():
        for parameter in stab.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=parameter.shape[-1]**-0.5)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
            parameter.copy_(parameter.bfloat16())
    return stab


def pooled(case: Case) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = (case.clips, case.clip_heads, case.c), (case.clips * case.frames, case.frame_heads, case.c)
    clip, frame = (torch.randn(shape, generator=generator).bfloat16().float() for shape in shapes)
    return clip, frame


def expected(stab: STAB, clip_pooled: Tensor, frame_pooled: Tensor) -> Tensor:
    with torch.no_grad():
        f = stab.global_attention.finish(stab.class_embedding, frame_pooled)
        if len(f) == len(clip_pooled):
            return f
        return stab._fuse(stab.dec.finish(stab.temporal_cls_token, clip_pooled), f)


class Guarded:
    """NaNs between two guards."""

    def __init__(self, count: int, dtype: torch.dtype) -> None:
        self.whole = torch.full((count + 2 * GUARD,), 7, dtype=dtype)
        self.inner = self.whole[GUARD:GUARD + count].fill_(torch.nan)

    def check(self) -> None:
        assert (self.whole[:GUARD] == 7).all()
        assert (self.whole[-GUARD:] == 7).all()


class Kernel:
    """A tower's weights in one dtype."""

    def __init__(self, library: ctypes.CDLL, stab: STAB, case: Case, dtype: torch.dtype) -> None:
        self.library, self.case, self.dtype = library, case, dtype
        fusion: Any = stab.proj
        frame = list(stab.global_attention.value_weights())
        weights = (stab.temporal_cls_token, *stab.dec.value_weights(), stab.class_embedding, *frame,
                   *stab.dec.mlp_weights(), stab.balance, fusion[0].weight, fusion[0].bias, fusion[2].weight,
                   fusion[2].bias)
        self.weights = [w.detach().to(dtype).contiguous() for w in weights]

    def __call__(self, clip_pooled: Tensor, frame_pooled: Tensor, *, backwards: bool = False) -> Tensor:
        case, clips = self.case, len(clip_pooled)
        frames = len(frame_pooled) // clips
        clip_pooled, frame_pooled = clip_pooled.to(self.dtype), frame_pooled.to(self.dtype)
        y = Guarded(clips * frames * case.c, self.dtype)
        size = self.library.workspace_of_class_tokens(ctypes.c_int64(clips), frames, case.c)
        workspace = Guarded(size, torch.float32)
        tensors = (clip_pooled, frame_pooled, *self.weights, y.inner)
        pointers = [0 if name == "frame.bv" else t.data_ptr() for name, t in zip(TENSORS, tensors, strict=True)]
        if frames == 1:
            pointers = [0 if name.startswith(("clip", "mlp", "fusion")) else pointer
                        for name, pointer in zip(TENSORS, pointers, strict=True)]
        self.library.run_class_tokens(DTYPES.index(self.dtype), (ctypes.c_void_p * len(pointers))(*pointers),
                                      ctypes.c_void_p(workspace.inner.data_ptr()), ctypes.c_int64(clips), frames,
                                      case.c, case.clip_heads, case.frame_heads, ctypes.c_float(1e-5), backwards)
        y.check()
        workspace.check()
        return y.inner.view(-1, case.c)


CASES = [Case(1, 4, 64), Case(2, 4, 136), Case(3, 2, 72, 1, 2), Case(3, 1, 96), Case(1, 1, 104, 1, 1),
         Case(2, 2, 88, 11, 8)]


def named(value: Any) -> str:
    return "-".join(map(str, value)) if isinstance(value, Case) else str(value).removeprefix("torch.")


def assert_as_close_as_torch(y: Tensor, stab: STAB, inputs: tuple[Tensor, Tensor]) -> None:
    theirs = expected(stab.to(y.dtype), *(z.to(y.dtype) for z in inputs))
    exact = expected(stab.double(), *(z.double() for z in inputs))
    error, torch_error = relative_error(y, exact), relative_error(theirs, exact)
    assert error <= Tolerance().limit(torch_error, y.dtype), f"error {error:.2e}, torch's own {torch_error:.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@pytest.mark.parametrize("case", CASES, ids=named)
def test_as_close_as_torch(library: ctypes.CDLL, case: Case, dtype: torch.dtype) -> None:
    stab, inputs = tower(case), pooled(case)
    y = Kernel(library, stab, case, dtype)(*inputs)
    assert_as_close_as_torch(y, stab, inputs)


@pytest.mark.parametrize("case", CASES[2:5], ids=named)
def test_in_either_order_of_threads(library: ctypes.CDLL, case: Case) -> None:
    inputs, kernel = pooled(case), Kernel(library, tower(case), case, torch.bfloat16)
    y = kernel(*inputs)
    assert torch.equal(kernel(*inputs, backwards=True), y)
    assert torch.equal(kernel(*inputs), y)


def test_no_clip_depends_on_another(library: ctypes.CDLL) -> None:
    """More frames than a group of rows has, and more of the MLP's rows than shared memory holds."""
    case = Case(9, 2, 72)
    stab, (clips, frames) = tower(case), pooled(case)
    kernel = Kernel(library, stab, case, torch.bfloat16)
    y = kernel(clips, frames)
    for first, last in ((0, 1), (3, 5), (4, 9)):
        assert torch.equal(kernel(clips[first:last], frames[2 * first:2 * last]), y[2 * first:2 * last])
    assert_as_close_as_torch(y, stab, (clips, frames))


def test_no_image_depends_on_another(library: ctypes.CDLL) -> None:
    case = Case(19, 1, 64)
    clips, frames = pooled(case)
    kernel = Kernel(library, tower(case), case, torch.float16)
    y = kernel(clips, frames)
    for first, last in ((0, 1), (15, 18)):
        assert torch.equal(kernel(clips[first:last], frames[first:last]), y[first:last])
