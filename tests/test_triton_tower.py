"""The tower and the projector in the Triton backend's own calls: values, launches, waiting, company.

Compiled where there is a GPU, else in the repaired interpreter.
"""
from __future__ import annotations

import copy
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from test_nn import lively
from test_triton_ops import DEVICE, poisoned
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from tower_cases import Case, errors

import python_ref
from bench import launches
from panda_kernels import backends, fp8
from panda_kernels.backends.triton import stab_tower, token_mlp
from panda_kernels.nn import STAB, Projector
from panda_kernels.nn.stab import prepared_by
from panda_kernels.rectangles import Rectangles
from panda_kernels.spec import Tolerance, relative_error
from panda_kernels.triton._launch import recorded

DTYPES = (torch.float32, torch.bfloat16)
BY_FP8 = pytest.mark.skipif(DEVICE == "cuda" and not fp8.has_products(torch.device("cuda")),
                            reason="this GPU does not multiply e4m3")


CASES = {
    "image": Case(1, (5, 7), ((1, 4, 2, 7),), clips=2),
    "image_bytes": Case(1, (3, 3), ((0, 3, 0, 3),), patch=14, dim=48, heads=4, pixels="uint8"),
    "two": Case(2, (4, 5), ((0, 4, 0, 5), (1, 4, 1, 4)), dim=88, gstra_heads=11, clips=2, missing=True),
    "three": Case(3, (5, 4), ((0, 5, 0, 4), (2, 5, 1, 4), (1, 3, 0, 2)), dim=84, heads=4, pixels="uint8"),
    "four": Case(4, (3, 5), ((0, 3, 0, 5), (1, 3, 3, 5), (0, 3, 1, 4)), dim=68, heads=2, clips=2, missing=True),
    "even_heads": Case(2, (5, 4), ((0, 5, 0, 4), (1, 5, 1, 3)), heads=4, clips=2),
    "five_windows_of_3": Case(5, (6, 5), ((0, 6, 0, 5), (2, 5, 1, 5)), dim=42, heads=6, gstra_heads=2, window=3),
}


@cache
def tower_of(name: str, dtype: torch.dtype) -> tuple[STAB, python_ref.STAB]:
    """The same weights, exact in bfloat16, in every dtype: ours on the device, and the reference."""
    case = CASES[name]
    sizes: dict[str, Any] = {"patch": case.patch, "window": case.window, "num_heads": case.heads,
                             "gstra_heads": case.gstra_heads}
    tower, reference = STAB(case.dim, **sizes, dtype=torch.float64), python_ref.STAB(case.dim, **sizes).to(dtype)
    reference.load_state_dict(lively(tower).bfloat16().state_dict())
    return tower.to(dtype).to(DEVICE).eval(), reference.eval()


@cache
def frames_of(name: str) -> tuple[Tensor, Rectangles, Tensor | None]:
    """Pixels with some left over beyond the last patch and a mask, rectangles, and which frames there are."""
    case = CASES[name]
    generator = torch.Generator().manual_seed(1)
    height, width = case.frame_size()
    shape = (case.clips, case.frames, 4, height, width)
    if case.pixels == "uint8":
        x = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    else:
        x = torch.randn(shape, generator=generator).bfloat16().float()
    present = torch.ones(case.clips, case.frames, dtype=torch.bool)
    present[-1, 1 % case.frames] = not case.missing
    x[:, :, 3] = 0
    corners = case.all_corners()
    for frame, (row0, row1, col0, col1) in zip(x.flatten(0, 1), corners, strict=True):
        frame[3, row0 * case.patch:row1 * case.patch, col0 * case.patch:col1 * case.patch] = 1
    if case.missing:  # takes the whole grid
        corners[-case.frames + 1] = (0, case.grid[0], 0, case.grid[1])
    return x, Rectangles.from_corners(corners, case.window), present if case.missing else None


def run(name: str, dtype: torch.dtype, x: Tensor, rectangles: Rectangles,
        present: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    with torch.no_grad():
        prepared = prepared_by(stab_tower, tower_of(name, dtype)[0])
        rectangles = rectangles._replace(corners=rectangles.corners.to(DEVICE))
        return stab_tower.run(prepared, x.to(DEVICE), rectangles, None if present is None else present.to(DEVICE))


@cache
def by_reference(name: str, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Tokens and grids of the released arithmetic."""
    (x, _, present), reference = frames_of(name), tower_of(name, dtype)[1]
    if x.dtype == torch.uint8:
        x = torch.cat([python_ref.patch.normalise(x[:, :, :3].double()), x[:, :, 3:].double()], 2)
    if present is not None:
        x = x * present[:, :, None, None, None]
    with torch.no_grad():
        tokens, grids = reference(x, nn.Identity())
    return torch.cat(tokens), grids


@pytest.mark.parametrize(("name", "dtype"), [*product(CASES, DTYPES), ("image", torch.float16), ("two", torch.float16)])
def test_close_to_float64(name: str, dtype: torch.dtype) -> None:
    x, rectangles, present = frames_of(name)
    (exact, grids), (plain, _) = by_reference(name, torch.float64), by_reference(name, dtype)
    with poisoned():
        tokens, cu_seqlens, grid = (t.cpu() for t in run(name, dtype, x, rectangles, present))
    window = CASES[name].window
    assert tokens.dtype == dtype and tokens.is_contiguous()
    assert torch.equal(grid, torch.stack(grids)) and torch.equal(grid, rectangles.grid(window))
    assert torch.equal(cu_seqlens, rectangles.cu_seqlens(window)) and cu_seqlens.dtype == torch.int32
    ours, theirs = (errors(y, exact, cu_seqlens[:-1]) for y in (tokens, plain))
    limits = [Tolerance().limit(error, dtype) for error in theirs]
    assert ours[0] <= limits[0] and ours[1] <= limits[1], f"errors {ours}, torch's own {theirs}"


def errors_by_fp8(name: str, dtype: torch.dtype, server: Any) -> tuple[tuple[float, float], tuple[float, float]]:
    """Of the server's one call, and of the tower composed of its ops on the CPU, which quantises twice as much."""
    (x, rectangles, present), (exact, _) = frames_of(name), by_reference(name, torch.float64)
    tower = tower_of(name, dtype)[0]
    composed = copy.deepcopy(tower).cpu()
    composed.products = "fp8"
    on_device = rectangles._replace(corners=rectangles.corners.to(DEVICE))
    with torch.no_grad(), poisoned():
        tokens, cu_seqlens, _ = server.run(server.by_fp8(prepared_by(server, tower)), x.to(DEVICE), on_device,
                                           None if present is None else present.to(DEVICE))
        theirs = composed(x, rectangles, present=present).tokens
    assert tokens.dtype == dtype
    ours, theirs = (errors(y.cpu(), exact, cu_seqlens.cpu()[:-1]) for y in (tokens, theirs))
    return ours, theirs


@BY_FP8
@pytest.mark.parametrize(("name", "dtype"), [("two", torch.float16), ("three", torch.bfloat16), ("four", torch.float32),
                                             ("five_windows_of_3", torch.float32)])
def test_by_fp8_no_worse_than_composed(name: str, dtype: torch.dtype) -> None:
    ours, composed = errors_by_fp8(name, dtype, stab_tower)
    assert 1e-3 < ours[1] < 0.1 and all(a < 1.2 * b for a, b in zip(ours, composed, strict=True)), (ours, composed)


@pytest.mark.parametrize("name", ["image", "two"])
def test_a_clip_beside_nan_has_its_own_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the libraries' products, torch's and the interpreter's, whose order of summing may follow the place of a
    row: here they have none."""
    multiply = np.matmul
    monkeypatch.setattr(torch, "mm", lambda a, b: (a.double() @ b.double()).to(a.dtype))
    monkeypatch.setattr(np, "matmul", lambda a, b, dtype: multiply(a, b, dtype=np.float64).astype(dtype))
    case, (x, rectangles, _) = CASES[name], frames_of(name)
    clip, own = x[:1], rectangles.corners[:case.frames]
    whole = torch.tensor([(0, case.grid[0], 0, case.grid[1])] * case.frames)
    beside = torch.full_like(clip, torch.nan)
    batch = Rectangles.from_corners(torch.cat([whole, own, own.flip(0)]), case.window)
    alone, *_ = run(name, torch.bfloat16, clip, Rectangles.from_corners(own, case.window))
    among, cu_seqlens, _ = run(name, torch.bfloat16, torch.cat([beside, clip, beside]), batch)
    begin, end = cu_seqlens[[case.frames, 2 * case.frames]].tolist()
    assert alone.isfinite().all() and torch.equal(alone, among[begin:end])


def test_a_missing_frame_may_hold_anything_and_bits_repeat() -> None:
    x, rectangles, present = frames_of("two")
    assert present is not None
    holes = torch.where(present[:, :, None, None, None], x, torch.nan)
    first, again = (run("two", torch.bfloat16, frames, rectangles, present)[0] for frames in (x, holes))
    assert torch.equal(first, again)


def test_any_layout_of_pixels() -> None:
    x, rectangles, _ = frames_of("image_bytes")
    layouts = [x[:, :, :3], x.movedim(2, -1).contiguous().movedim(-1, 2), torch.stack([x, x], -1)[..., 0]]
    first, *others = (run("image_bytes", torch.float32, frames, rectangles)[0] for frames in layouts)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize(("clips", "frames", "most"), [(2, 4, 20), (1, 4, 20), (3, 1, 12)])
def test_launches(clips: int, frames: int, most: int) -> None:
    tower, projector = launches.of_inference(clips, frames)
    assert len(tower) <= most and len(projector) <= 2, [launch.name for launch in [*tower, *projector]]
    # What is counted is what computes: a copy or a conversion would show.
    assert [launch.name for launch in [*tower, *projector] if launch.name.startswith("aten")] == [
        "aten.mm.default", "aten.addmm.default"]


def test_launches_by_fp8() -> None:
    """As many, two of them others."""
    with torch.no_grad():
        native = prepared_by(stab_tower, STAB(64, dtype=torch.bfloat16, device="meta").eval())
    pixels = torch.empty(2, 4, 3, 56, 56, dtype=torch.uint8, device="meta")
    rectangles = Rectangles(torch.empty(8, 4, dtype=torch.int64, device="meta"), 32, 56)
    names = []
    for prepared in (native, stab_tower.by_fp8(native)):
        with torch.no_grad(), launches.counted() as found:
            stab_tower.run(prepared, pixels, rectangles, None)
        names.append([launch.name for launch in found])
    others = [(a, b) for a, b in zip(*names, strict=True) if a != b]
    assert len(names[0]) <= 20 and others == [
        ("local_encoding.convolve_over_time", "local_encoding.quantise_over_time"),
        ("matmul.product", "matmul.scaled_product")]


def test_a_copy_would_be_counted() -> None:
    with launches.counted() as found:
        torch.empty(4, 6, device="meta").t().contiguous().add_(1)
    assert [launch.name for launch in found] == ["aten.clone.default", "aten.add_.Tensor"]


@pytest.mark.parametrize("frames", [4, 1])
def test_nothing_waits_for_the_device(frames: int) -> None:
    """Fake tensors have no values: reading one, as ``.item()`` and ``.tolist()`` do, raises."""
    with FakeTensorMode(allow_non_fake_inputs=False), torch.no_grad(), recorded() as found:
        prepared = prepared_by(stab_tower, STAB(64).eval())
        rectangles = Rectangles(torch.empty(2 * frames, 4, dtype=torch.int64), 30, 50)
        x, present = torch.empty(2, frames, 3, 56, 70), torch.empty(2, frames, dtype=torch.bool)
        tokens, cu_seqlens, grid = stab_tower.run(prepared, x, rectangles, present)
        assert tokens.shape == (50, 64) and cu_seqlens.shape == (2 * frames + 1,) and grid.shape == (2 * frames, 2)
        assert found


def test_the_tower_goes_there_in_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (stab_tower, token_mlp):
        monkeypatch.setattr(module, "refusals", lambda inputs: [])
    monkeypatch.setattr(backends, "load_error", lambda name: None)
    monkeypatch.setattr(torch.ops.panda_kernels, "patch_embed", None)  # no op boundary is passed
    x, rectangles, _ = frames_of("three")
    tower = tower_of("three", torch.bfloat16)[0]
    rectangles, x = rectangles._replace(corners=rectangles.corners.to(DEVICE)), x.to(DEVICE)
    projector = Projector(84, 32, dtype=torch.bfloat16, device=DEVICE)
    tower.backend = projector.backend = "triton"
    with torch.no_grad():
        output = tower(x, rectangles)
        expected = stab_tower.run(prepared_by(stab_tower, tower), x, rectangles, None)
        projected = projector(output.tokens)
        by_op = token_mlp.fwd(output.tokens, *projector.parameters())
    assert all(torch.equal(given, wanted) for given, wanted in zip(output, expected, strict=True))
    assert relative_error(projected, by_op) < 1e-2


@BY_FP8
def test_the_tower_goes_there_by_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the device has such products; what is kept of the weights is renewed with ``products``."""
    monkeypatch.setattr(stab_tower, "refusals", lambda inputs: [])
    monkeypatch.setattr(backends, "load_error", lambda name: None)
    x, rectangles, _ = frames_of("three")
    tower = copy.deepcopy(tower_of("three", torch.bfloat16)[0])
    rectangles, x = rectangles._replace(corners=rectangles.corners.to(DEVICE)), x.to(DEVICE)
    tower.backend, tower.products = "triton", "fp8"
    with torch.no_grad():
        monkeypatch.setattr(fp8, "has_products", lambda device: False)
        with monkeypatch.context() as patch:
            patch.setattr(STAB, "_compose", lambda *args: torch.tensor(7))
            assert tower(x, rectangles).tokens == 7
        monkeypatch.setattr(fp8, "has_products", lambda device: True)
        tokens, kept = tower(x, rectangles).tokens, tower.constants()
        prepared = prepared_by(stab_tower, tower)
        expected, native = (stab_tower.run(weights, x, rectangles, None)[0]
                            for weights in (stab_tower.by_fp8(prepared), prepared))
        assert torch.equal(tokens, expected) and not torch.equal(tokens, native)
        tower.products = "native"
        assert torch.equal(tower(x, rectangles).tokens, native)
        tower.products = "fp8"
        assert tower.constants() is not kept, "its memory was given back"
        assert torch.equal(tower(x, rectangles).tokens, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7,), (2, 150)])
def test_projector_close_to_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, 40, generator=generator).bfloat16()
    projector = lively(Projector(40, 136, dtype=torch.float64)).bfloat16()
    weights = [p.detach() for p in projector.parameters()]
    prepared = token_mlp.prepare(*(w.to(dtype).to(DEVICE) for w in weights))
    y = token_mlp.run(prepared, x.to(dtype).to(DEVICE)).cpu()

    def torchs(precision: torch.dtype) -> Tensor:
        w1, b1, w2, b2 = (w.to(precision) for w in weights)
        hidden = nn.functional.gelu(nn.functional.linear(x.to(precision), w1, b1))
        return nn.functional.linear(hidden, w2, b2)

    exact = torchs(torch.float64)
    assert y.shape == (*shape, 136) and y.dtype == dtype
    assert relative_error(y, exact) <= Tolerance().limit(relative_error(torchs(dtype), exact), dtype)
