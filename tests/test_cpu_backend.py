"""The compiled CPU backend in every SIMD tier of this machine: ops and the streamed tower against float64, bit for bit
whatever the company and the number of threads, and nothing read or written outside what was given."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from op_cases import OPS, assert_as_close_as_torch, call, in_dtype, result_dtype, with_gradients
from test_nn import lively
from test_ops import SEVERAL, call_by_name, sample
from torch import Tensor
from tower_cases import Case, errors

import panda_kernels
from panda_kernels import backends
from panda_kernels.backends import _extension, cpu
from panda_kernels.backends.cpu import stab_tower
from panda_kernels.nn import STAB
from panda_kernels.ops import SPECS
from panda_kernels.rectangles import Rectangles
from panda_kernels.spec import Inputs, Tolerance, relative_error

ALL_TIERS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
DTYPES = (torch.float32, torch.bfloat16)
KERNELS = torch.ops.panda_kernels_cpu


def machine_tiers() -> list[str]:
    """The tiers that run here, lowest first. Without the extension, one, so that the tests fail with the reason."""
    if backends.load_error("cpu"):
        return ["portable"]
    before = KERNELS.isa()
    tiers = [name for name in ALL_TIERS if KERNELS.set_isa(name)]
    KERNELS.set_isa(before)
    return tiers


TIERS = machine_tiers()


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest) -> Iterator[str]:
    assert backends.load_error("cpu") is None
    before = KERNELS.isa()
    assert KERNELS.set_isa(request.param) and KERNELS.isa() == request.param
    yield request.param
    KERNELS.set_isa(before)


def bits(t: Tensor) -> Tensor:
    """Sign of zeros and payload of NaN included."""
    return t.contiguous().view({2: torch.int16, 4: torch.int32}[t.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def on_threads(count: int, function: Callable[[], Any]) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return function()
    finally:
        torch.set_num_threads(before)


# The ops

# More than one block of each loop that works by blocks, and no multiple of one.
LONG: dict[str, dict[str, Any]] = {
    "assemble_tokens": {"corners": ((0, 40, 0, 41), (1, 4, 2, 8)), "channels": 17},
    "batch_statistics": {"shape": (3, 47, 19)},
    "attention_pool": {"lengths": (300, 1, 16500, 17, 256), "channels": 19, "queries": 11},
    "depthwise_conv3d": {"shape": (1, 6, 9, 33, 150)},
    "local_encoding": {"shape": (1, 3, 29, 13, 24)},
    "patch_embed": {"shape": (2, 3, 92, 76), "channels": 40, "patch": 4},
    "token_mlp": {"shape": (1050, 20), "hidden": 36, "out": 33},
    "window_attention_pool": {"grid": (24, 25), "corners": ((1, 24, 0, 25), (3, 8, 5, 7)), "channels": 24, "window": 1},
}
assert set(LONG) == set(OPS)


@cache
def sizes(op: str) -> dict[str, Any]:
    return {**SPECS[op].test_sizes, "long": LONG[op]}


def inputs_of(op: str, case: str, dtype: torch.dtype) -> Inputs:
    return SPECS[op].inputs(sizes(op)[case], dtype)


@cache
def references(op: str, case: str, dtype: torch.dtype) -> tuple[Tensor, float]:
    """The result in float64, and the reference's own error in ``dtype``."""
    reference, inputs = SPECS[op].load_reference(), inputs_of(op, case, dtype)
    exact = reference(**in_dtype(inputs, torch.float64))
    return exact, relative_error(reference(**inputs), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_close_to_float64(op: str, dtype: torch.dtype, tier: str) -> None:
    for case in sizes(op):
        exact, torch_error = references(op, case, dtype)
        y = call(op, inputs_of(op, case, dtype), "cpu")
        assert y.dtype == result_dtype(op, dtype)
        error = relative_error(y, exact)
        limit = SPECS[op].tolerance.limit(torch_error, dtype)
        assert error <= limit, f"{op} {case} {tier}: error {error:.2e}, torch's own {torch_error:.2e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_any_number_of_threads_gives_the_same_bits(op: str, dtype: torch.dtype, tier: str) -> None:
    for case in sizes(op):
        inputs = inputs_of(op, case, dtype)
        one, two = (on_threads(n, partial(call, op, inputs, "cpu")) for n in (1, 2))
        assert same_bits(one, two), case


def gradients(op: str, inputs: Inputs) -> dict[str, Tensor]:
    return with_gradients(partial(call_by_name, op, "cpu"), inputs)[1]




@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_gradients_close_to_float64(op: str, dtype: torch.dtype, tier: str) -> None:
    for case in sizes(op):
        inputs = inputs_of(op, case, dtype)
        result = with_gradients(partial(call_by_name, op, "cpu"), inputs)
        assert_as_close_as_torch(SPECS[op], result, inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_gradients_have_the_same_bits_on_any_number_of_threads(op: str, dtype: torch.dtype, tier: str) -> None:
    for case in sizes(op):
        inputs = inputs_of(op, case, dtype)
        one, two = (on_threads(n, partial(gradients, op, inputs)) for n in (1, 2))
        assert [name for name in one if not same_bits(one[name], two[name])] == [], case


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "case"), [(op, case) for op, case in SEVERAL if op in OPS])
def test_a_sample_has_the_same_gradient_alone_and_in_a_batch(op: str, case: str, dtype: torch.dtype, tier: str) -> None:
    inputs = inputs_of(op, case, dtype)
    y = call(op, inputs, "cpu")
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    _, batch = with_gradients(partial(call_by_name, op, "cpu"), inputs, cotangent)
    for i in range(2):
        alone, where, out = sample(op, inputs, i)
        alone = inputs | {name: inputs[name][own] for name, own in where.items()} | alone
        _, own_grads = with_gradients(partial(call_by_name, op, "cpu"), alone, cotangent[out])
        for name, own in where.items():
            assert name not in batch or same_bits(own_grads[name], batch[name][own]), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_nan_goes_wherever_the_reference_has_it(op: str, dtype: torch.dtype, tier: str) -> None:
    """One NaN early and one late in the tokens: none is lost in a maximum, a comparison or a partial sum."""
    for case in sizes(op):
        inputs = inputs_of(op, case, dtype)
        name = next(name for name, value in inputs.items() if isinstance(value, Tensor))
        if not inputs[name].is_floating_point():
            continue
        for at in (inputs[name].numel() // 40, -1 - inputs[name].numel() // 3):
            inputs[name] = inputs_of(op, case, dtype)[name].clone()
            inputs[name].view(-1)[at] = torch.nan
            # In float32: torch's bfloat16 products spread a NaN into the row before.
            expected = SPECS[op].load_reference()(**in_dtype(inputs, torch.float32)).isnan()
            assert torch.equal(call(op, inputs, "cpu").isnan(), expected), f"{case}: NaN at element {at}"


class Poison:
    """Memory in which everything not asked for is NaN, and results that are NaN until written."""

    GUARD = 256  # bytes; a multiple of the alignment torch allocates with

    def __init__(self) -> None:
        self.allocated: list[tuple[Tensor, int]] = []

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        buffer = torch.full((self.GUARD + size + self.GUARD,), 255, dtype=torch.uint8)
        self.allocated.append((buffer, size))
        return buffer[self.GUARD:self.GUARD + size].view(dtype).view(shape)

    def empty_like(self, t: Tensor) -> Tensor:
        return self.empty(*t.shape, dtype=t.dtype)

    def overrun(self) -> bool:
        return any(bool((b[:self.GUARD] != 255).any() or (b[self.GUARD + n:] != 255).any()) for b, n in self.allocated)

    @staticmethod
    def around(value: Any) -> Any:
        """A contiguous tensor one element into a buffer of NaN (of 255 for bytes, of 7777 for integers)."""
        if not isinstance(value, Tensor):
            return value
        fill = torch.nan if value.is_floating_point() else {torch.uint8: 255, torch.bool: True}.get(value.dtype, 7777)
        buffer = torch.full((value.numel() + 130,), fill, dtype=value.dtype)
        return buffer[1:1 + value.numel()].copy_(value.flatten()).view(value.shape)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Poison:
    memory = Poison()
    monkeypatch.setattr(torch, "empty", memory.empty)
    monkeypatch.setattr(torch, "empty_like", memory.empty_like)
    return memory


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_stays_inside_its_arguments(op: str, dtype: torch.dtype, tier: str, poison: Poison,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    for case in sizes(op):
        inputs = inputs_of(op, case, dtype)
        inside = call(op, {name: Poison.around(value) for name, value in inputs.items()}, "cpu")
        assert inside.isfinite().all(), case
        assert poison.allocated and not poison.overrun(), case
        with monkeypatch.context() as clean:
            clean.undo()
            assert same_bits(call(op, inputs, "cpu"), inside), case


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_gradients_stay_inside_their_arguments(op: str, dtype: torch.dtype, tier: str, poison: Poison,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    for case in sizes(op):
        inputs = inputs_of(op, case, dtype)
        inside = gradients(op, {name: Poison.around(value) for name, value in inputs.items()})
        assert poison.allocated and not poison.overrun(), case
        with monkeypatch.context() as clean:
            clean.undo()
            outside = gradients(op, inputs)
        assert [name for name in inside if not same_bits(inside[name], outside[name])] == [], case


def test_poison_is_seen(poison: Poison) -> None:
    inside = Poison.around(torch.ones(3, 5))
    assert inside.is_contiguous() and torch.as_strided(inside, (17,), (1,)).isnan().any()
    y = torch.empty(4, 3)
    assert y.isnan().all() and not poison.overrun()
    torch.as_strided(y, (13,), (1,)).zero_()
    assert poison.overrun()


# The streamed tower


# The grids of more than 512 tokens a clip take several bands of rows.
CASES = {
    "image": Case(1, (5, 7), ((1, 4, 2, 7),), clips=2),
    "image_bands": Case(1, (25, 27), ((3, 24, 1, 26),), pixels="uint8"),
    "two": Case(2, (7, 5), ((0, 7, 0, 5), (1, 6, 1, 4)), dim=96, clips=2, pixels="float16"),
    "three": Case(3, (9, 6), ((0, 9, 0, 6), (3, 8, 1, 4), (5, 7, 3, 6)), dim=84, heads=4, window=2, clips=2),
    "three_bands": Case(3, (21, 11), ((0, 21, 0, 11), (1, 20, 2, 9), (15, 20, 3, 6)), pixels="uint8"),
    "four": Case(4, (3, 5), ((0, 3, 0, 5), (1, 3, 3, 5), (0, 3, 1, 4)), patch=14, clips=2, pixels="uint8"),
    "four_bands": Case(4, (33, 9), ((0, 33, 0, 9), (1, 32, 1, 8), (14, 33, 0, 3), (15, 17, 7, 9)), dim=68, heads=2),
    "image_in_steps": Case(1, (4, 9), ((0, 4, 1, 8), (1, 4, 0, 9)), patch=7, dim=160, clips=2),
    "image_narrow": Case(1, (5, 4), ((1, 4, 0, 4),), patch=14, dim=68, heads=2, clips=3, pixels="uint8"),
    "windows_of_3": Case(2, (43, 14), ((0, 43, 0, 14), (1, 42, 2, 9)), dim=72, window=3),
    "image_of_3": Case(1, (7, 10), ((1, 7, 2, 9),), window=3, dim=40, heads=4, pixels="float16"),
    "five": Case(5, (6, 5), ((0, 6, 0, 5), (1, 4, 1, 5), (3, 5, 0, 3)), clips=2),
    "nine_wide": Case(9, (5, 31), ((0, 5, 0, 31), (1, 4, 11, 30)), dim=48),
}


@cache
def tower_of(name: str, dtype: torch.dtype, backend: str) -> STAB:
    """The same weights, exact in bfloat16, in every dtype."""
    case = CASES[name]
    tower = lively(STAB(case.dim, patch=case.patch, window=case.window, num_heads=case.heads, gstra_heads=4,
                        dtype=torch.float64)).bfloat16().to(dtype).eval()
    assert isinstance(tower, STAB)
    tower.backend = backend
    return tower


@cache
def frames_of(name: str) -> tuple[Tensor, Rectangles]:
    """Pixels with some left over beyond the last patch, uint8 ones strided as a decoder leaves them."""
    case = CASES[name]
    generator = torch.Generator().manual_seed(1)
    height, width = case.frame_size()
    shape = (case.clips, case.frames, height, width, 3)
    if case.pixels == "uint8":
        x = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).permute(0, 1, 4, 2, 3)
    else:
        x = torch.randn(shape, generator=generator).bfloat16().permute(0, 1, 4, 2, 3).contiguous().float()
        x = x.half() if case.pixels == "float16" else x
    corners = case.all_corners()
    return x, Rectangles.from_corners(corners, case.window)


@torch.no_grad()
def tokens_of(tower: STAB, x: Tensor, rectangles: Rectangles, present: Tensor | None = None) -> Tensor:
    return tower(x, rectangles, present=present).tokens


def present_of(name: str) -> Tensor | None:
    """One frame of the last clip missing in the cases of several clips of several frames."""
    case = CASES[name]
    if case.clips == 1 or case.frames == 1:
        return None
    present = torch.ones(case.clips, case.frames, dtype=torch.bool)
    present[-1, 1] = False
    return present


@cache
def composed(name: str, dtype: torch.dtype) -> tuple[Tensor, tuple[float, float]]:
    """The tower composed of torch's ops in float64, and its own errors in ``dtype``."""
    (x, rectangles), present = frames_of(name), present_of(name)
    exact = tokens_of(tower_of(name, torch.float64, "torch"), x, rectangles, present)
    plain = tokens_of(tower_of(name, dtype, "torch"), x, rectangles, present)
    return exact, errors(plain, exact, rectangles.cu_seqlens(CASES[name].window)[:-1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_streamed_tower_close_to_float64(name: str, dtype: torch.dtype, tier: str) -> None:
    exact, torch_errors = composed(name, dtype)
    x, rectangles = frames_of(name)
    y = tokens_of(tower_of(name, dtype, "cpu"), x, rectangles, present_of(name))
    assert y.dtype == dtype and y.is_contiguous()
    ours = errors(y, exact, rectangles.cu_seqlens(CASES[name].window)[:-1])
    limits = [Tolerance().limit(error, dtype) for error in torch_errors]
    assert ours[0] <= limits[0] and ours[1] <= limits[1], f"{name} {tier}: errors {ours}, torch's own {torch_errors}"


def test_inference_is_streamed_and_what_needs_gradients_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    run = stab_tower.run

    def counted(*arguments: Any) -> Tensor:
        calls.append(arguments)
        return run(*arguments)

    monkeypatch.setattr(stab_tower, "run", counted)
    x, rectangles = frames_of("four")
    for backend, expected in (("cpu", 1), ("auto", 2), ("torch", 2)):
        tokens_of(tower_of("four", torch.float32, backend), x, rectangles)
        assert len(calls) == expected
    tower_of("four", torch.float32, "cpu")(x, rectangles)
    assert len(calls) == 2
    tokens_of(tower_of("four", torch.float64, "auto"), x, rectangles)
    assert len(calls) == 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_streamed_tower_gives_the_same_bits_on_any_number_of_threads(name: str, dtype: torch.dtype, tier: str) -> None:
    run = partial(tokens_of, tower_of(name, dtype, "cpu"), *frames_of(name), present_of(name))
    one, again, two = (on_threads(n, run) for n in (1, 1, 2))
    assert same_bits(one, again) and same_bits(one, two)


def in_company(name: str, beside: float) -> tuple[tuple[Tensor, Rectangles], tuple[Tensor, Rectangles]]:
    """A clip alone, and as the second of three whose others are ``beside`` all over, with other rectangles."""
    case, (x, rectangles) = CASES[name], frames_of(name)
    clip, own = x[:1], rectangles.corners[:case.frames]
    neighbour = torch.full_like(clip, 255 if clip.dtype == torch.uint8 else beside)
    whole = torch.tensor([(0, case.grid[0], 0, case.grid[1])] * case.frames)
    corners = torch.cat([whole, own, own.flip(0)])
    batch = torch.cat([neighbour, clip, neighbour]), Rectangles.from_corners(corners, case.window)
    return (clip, Rectangles.from_corners(own, case.window)), batch


def second(name: str, rectangles: Rectangles) -> slice:
    """The packed tokens of the second clip."""
    frames = CASES[name].frames
    return slice(*rectangles.cu_seqlens(CASES[name].window)[[frames, 2 * frames]].tolist())


IN_COMPANY = ("image", "three", "four_bands", "windows_of_3", "five", "three_bands")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", IN_COMPANY)
def test_a_clip_has_the_same_bits_in_any_company(name: str, dtype: torch.dtype, tier: str) -> None:
    tower = tower_of(name, dtype, "cpu")
    for beside in (0.5, torch.nan):
        clip, batch = in_company(name, beside)
        alone, among = (tokens_of(tower, *frames) for frames in (clip, batch))
        assert alone.isfinite().all()
        differs = (bits(alone) != bits(among[second(name, batch[1])])).any(1).nonzero().flatten().tolist()
        assert not differs, f"{name}: other bits in tokens {differs}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_smallest_change_of_a_clip_changes_its_bits(dtype: torch.dtype, tier: str) -> None:
    """Else the tests of equal bits could not fail: one byte of one frame, one step up, and its neighbour frame too."""
    x, rectangles = frames_of("four")
    tower, nudged = tower_of("four", dtype, "cpu"), x.clone()
    nudged[0, 1, 0, 20, 20] ^= 1
    before, after = tokens_of(tower, x, rectangles), tokens_of(tower, nudged, rectangles)
    assert not same_bits(before, after)
    clip = int(rectangles.cu_seqlens(2)[4])
    assert same_bits(before[clip:], after[clip:])


def test_a_missing_frame_may_hold_anything(tier: str) -> None:
    x, rectangles = frames_of("five")
    present, holes = present_of("five"), x.clone()
    holes[-1, 1] = torch.nan
    tower = tower_of("five", torch.float32, "cpu")
    assert same_bits(tokens_of(tower, holes, rectangles, present), tokens_of(tower, x, rectangles, present))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_streamed_tower_stays_inside_its_arguments(name: str, dtype: torch.dtype, tier: str, poison: Poison,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    x, rectangles = frames_of(name)
    tower, present = tower_of(name, dtype, "cpu"), present_of(name)
    tower.backend = "cpu"  # forgets the weights packed before, in memory without poison
    inside = rectangles._replace(corners=Poison.around(rectangles.corners))
    strided = Poison.around(x.movedim(2, -1)).movedim(-1, 2)
    y = tokens_of(tower, strided, inside, None if present is None else Poison.around(present))
    assert y.isfinite().all()
    assert poison.allocated and not poison.overrun()
    monkeypatch.undo()
    assert same_bits(y, tokens_of(tower, x, rectangles, present))
    tower.backend = "cpu"


# The tier asked for, and no extension at all


def isa_in_a_new_process(value: str) -> str:
    environment = os.environ | {"PANDA_KERNELS_ISA": value}
    code = ("import torch; from panda_kernels import backends; assert backends.load_error('cpu') is None; "
            "print(torch.ops.panda_kernels_cpu.isa())")
    run = [sys.executable, "-c", code]
    root = Path(panda_kernels.__file__).parents[1]
    return subprocess.run(run, check=True, capture_output=True, text=True, cwd=root, env=environment).stdout.strip()


def test_the_environment_lowers_the_tier() -> None:
    assert isa_in_a_new_process("portable") == "portable"
    assert isa_in_a_new_process(TIERS[len(TIERS) // 2]) == TIERS[len(TIERS) // 2]
    assert isa_in_a_new_process("sse9") == TIERS[-1]


def test_a_tier_that_is_not_there_changes_nothing(tier: str) -> None:
    for name in {"sse9", "", *ALL_TIERS} - set(TIERS):
        assert not KERNELS.set_isa(name)
        assert KERNELS.isa() == tier


@pytest.fixture
def empty_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where the backend looks for its extension from now on. The loaded one stays, and so does what is cached."""
    monkeypatch.setattr(_extension, "PACKAGE", tmp_path)
    monkeypatch.setattr(cpu, "load_error", cpu.load_error.__wrapped__)
    monkeypatch.setattr(backends, "load_error", backends.load_error.__wrapped__)
    return tmp_path


def never_built(folder: Path) -> str:
    return "extension is missing: it was never built"


def build_failed(folder: Path) -> str:
    (folder / "_build.json").write_text('{"error": "no C++ compiler"}')
    return "extension is missing: no C++ compiler"


def not_a_library(folder: Path) -> str:
    (folder / "_cpu.so").write_bytes(b"not a library")
    return f"does not load under torch {torch.__version__}"


@pytest.mark.parametrize("damage", [never_built, build_failed, not_a_library])
def test_without_the_extension(damage: Callable[[Path], str], empty_package: Path) -> None:
    reason = damage(empty_package)
    assert reason in str(backends.status()["cpu"]) and backends.status()["torch"] is None
    for op in OPS:
        inputs = inputs_of(op, next(iter(sizes(op))), torch.float32)
        assert same_bits(call(op, inputs, "auto"), call(op, inputs, "torch"))
        with pytest.raises(backends.BackendError, match=f"{op}: .*{re.escape(reason)}"):
            call(op, inputs, "cpu")
    x, rectangles = frames_of("four")
    by_torch = tokens_of(tower_of("four", torch.float32, "torch"), x, rectangles)
    assert same_bits(tokens_of(tower_of("four", torch.float32, "auto"), x, rectangles), by_torch)
    with pytest.raises(backends.BackendError, match=re.escape(reason)):
        tokens_of(tower_of("four", torch.float32, "cpu"), x, rectangles)


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeated_tokens_have_the_bits_of_their_first(dtype: torch.dtype, tier: str) -> None:
    """Copies are not computed again; rows that differ in a single element, wherever it is, are no copies."""
    inputs = SPECS["token_mlp"].inputs({"shape": (40, 130), "hidden": 36, "out": 33}, dtype)
    x = inputs["x"]
    x[[3, 17, 39]] = x[1].clone()
    x[20:33] = x[1].clone()
    for row, channel in zip(range(20, 33), range(0, 130, 10), strict=True):
        x[row, channel] += 1
    x[5] = x[6] = torch.nan
    y = call("token_mlp", inputs, "cpu")
    alone = torch.cat([call("token_mlp", inputs | {"x": row[None]}, "cpu") for row in x])
    assert same_bits(y, alone) and len(y.unique(dim=0)) > 30
