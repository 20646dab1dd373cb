"""FP8: what quantisation keeps, products against float64, modules that use it by request alone."""
from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_nn import DIM, lively, pair, pixels
from torch import Tensor

from bench import fp8_errors
from panda_kernels import fp8
from panda_kernels.nn import STAB, Projector, lste_fp8
from panda_kernels.nn.lste import encode
from panda_kernels.spec import Draw, relative_error
from panda_kernels.tuning import cases, lookup

HALF_UNIT = 2.0**-4  # of a number with four significant bits
ROUNDING = HALF_UNIT / 3**0.5 * 0.736  # root mean square, for leading bits even in the logarithm
TINIEST = 2.0**-9 / fp8.LARGEST  # e4m3's smallest number, beside the largest of its row
EVERY = torch.arange(0, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return Draw(seed, dtype)(*shape, scale=scale)


def values_of(rows: fp8.Fp8Rows) -> Tensor:
    """What the rows hold, in float64, padding included."""
    return rows.values.double() * rows.scales.double()


def bits(t: Tensor) -> Tensor:
    return t.view(torch.uint8)


# Quantisation


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30, 2.0**-133])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_row_comes_back_but_for_its_last_bits(dtype: torch.dtype, scale: float) -> None:
    x = draw(7, 100, dtype=torch.float64).mul_(scale).to(dtype)
    rows = fp8.quantise(x)
    assert rows.values.dtype == torch.float8_e4m3fn and rows.scales.dtype == torch.float32
    assert rows.values.shape == (7, 112) and rows.scales.shape == (7, 1)
    exact = x.double()
    largest = exact.abs().amax(1, keepdim=True).clamp_min(fp8.LARGEST * fp8.SMALLEST_SCALE)
    error = (values_of(rows)[:, :100] - exact).abs()
    limit = torch.maximum(exact.abs() * HALF_UNIT, largest * TINIEST / 2) * (1 + 1e-5)
    assert (error <= limit).all()
    assert not values_of(rows)[:, 100:].any()
    if scale != 2.0**-133:
        assert torch.equal(values_of(rows).abs().amax(1).float(), (rows.scales * fp8.LARGEST)[:, 0])


def test_what_e4m3_holds_is_exact() -> None:
    x = torch.cat([EVERY, -EVERY]) * torch.tensor([[1.0], [2.0**-40], [2.0**60]])
    rows = fp8.quantise(x)
    assert rows.scales[:, 0].tolist() == [1.0, 2.0**-40, 2.0**60]
    assert torch.equal(values_of(rows)[:, :x.shape[1]], x.double())


def test_a_row_of_zeros_is_zero() -> None:
    rows = fp8.quantise(torch.zeros(2, 16, dtype=torch.bfloat16))
    assert not values_of(rows).any() and (rows.scales == fp8.SMALLEST_SCALE).all()


@pytest.mark.parametrize("fault", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("gelu", [False, True])
def test_a_row_that_is_not_finite_becomes_nan_and_no_other(fault: float, gelu: bool) -> None:
    x = draw(3, 20, dtype=torch.bfloat16)
    sound = fp8.quantise(x, gelu=gelu)
    x[1, 5] = fault
    rows = fp8.quantise(x, gelu=gelu)
    assert values_of(rows)[1, :20].isnan().all()
    weight = fp8.prepare(draw(16, 20), draw(16))
    y = fp8.product(rows, weight, torch.float32)
    assert y[1].isnan().all() and torch.equal(y[::2], fp8.product(sound, weight, torch.float32)[::2])


def test_gelu_is_torchs() -> None:
    x = draw(5, 64, scale=3.0)
    with_gelu, after = fp8.quantise(x, gelu=True), fp8.quantise(F.gelu(x))
    assert torch.equal(bits(with_gelu.values), bits(after.values)) and torch.equal(with_gelu.scales, after.scales)


@pytest.mark.parametrize(("x", "error", "said"), [
    (torch.zeros(0, 4), ValueError, "at least one element"), (torch.tensor(1.0), ValueError, r"\[..., K\]"),
    (torch.zeros(2, 4, dtype=torch.int32), TypeError, "floating")])
def test_what_cannot_be_quantised(x: Tensor, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=f"fp8.quantise: x: .*{said}"):
        fp8.quantise(x)


# Products


@pytest.mark.parametrize(("K", "N"), [(1024, 682), (682, 64), (48, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product_errs_by_its_numbers_rounding_alone(K: int, N: int, dtype: torch.dtype) -> None:
    x, w, b = draw(40, K, dtype=dtype), draw(N, K, seed=1, dtype=dtype, scale=K**-0.5), draw(N, seed=2, dtype=dtype)
    rows, weight = fp8.quantise(x), fp8.prepare(w, b)
    assert weight.values.shape == (N + -N % 16, K + -K % 16) and weight.scales.shape == (1, N + -N % 16)
    y = fp8.product(rows, weight, dtype)
    assert y.shape == (40, N) and y.dtype == dtype and y.is_contiguous()
    exact = x.double() @ w.double().T + b.double()
    # |ab - a'b'| <= |ab| ((1 + e)^2 - 1); what is below e4m3's normal numbers adds half of its smallest.
    size = x.double().abs() @ w.double().abs().T
    tiny = TINIEST * K * x.double().abs().amax(1, keepdim=True) * w.double().abs().amax(1)
    limit = size * ((1 + HALF_UNIT) ** 2 - 1) + tiny + (exact.abs() + size) * torch.finfo(dtype).eps
    assert ((y.double() - exact).abs() <= limit).all()
    assert relative_error(y, exact) < 1.1 * 2**0.5 * ROUNDING
    of_rounded = values_of(rows)[:, :K] @ (weight.values.double() * weight.scales.double().T)[:N, :K].T
    assert relative_error(y, of_rounded + b.double()) < torch.finfo(dtype).eps


def test_alone_or_in_any_company_the_same_bits() -> None:
    x, weight = draw(70, 682, dtype=torch.bfloat16), fp8.prepare(draw(50, 682, seed=1), draw(50, seed=2))
    y = fp8.product(fp8.quantise(x), weight, torch.float32)
    for part in (slice(3, 4), slice(10, 31), slice(60, 70)):
        assert torch.equal(fp8.product(fp8.quantise(x[part]), weight, torch.float32), y[part])


def test_product_refuses_another_width() -> None:
    with pytest.raises(ValueError, match=r"fp8.product: rows.values: expected shape \[M, 32\], got \[2, 48\]"):
        fp8.product(fp8.quantise(torch.ones(2, 33)), fp8.prepare(torch.ones(16, 32)), torch.float32)


# Modules


def projector(*sizes: int, dtype: torch.dtype = torch.float32) -> Projector:
    module = Projector(*sizes, dtype=dtype)
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=i, scale=parameter[0].numel() ** -0.5))
    return module.eval()


def by_fp8(module: Any) -> Any:
    module.products = "fp8"
    return module


@pytest.mark.parametrize("sizes", [(64, 96), (45, 51)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projector_by_request_alone(sizes: tuple[int, int], dtype: torch.dtype) -> None:
    module, x = projector(*sizes, dtype=dtype), draw(2, 9, sizes[0], seed=9, dtype=dtype)
    with torch.no_grad():
        native, exact = module(x), copy.deepcopy(module).double()(x.double())
        y = by_fp8(module)(x)
        assert y.shape == native.shape and y.dtype == dtype and y.is_contiguous()
        assert relative_error(native, exact) < 1e-2 < relative_error(y, exact) < 0.08
        assert torch.equal(module(x[1, 3]), y[1, 3])
        module.products = "native"
        assert torch.equal(module(x), native)


@pytest.mark.parametrize("module", [Projector(8, 16), STAB(DIM)])
def test_other_names_are_refused(module: Any) -> None:
    assert module.products == "native"
    with pytest.raises(ValueError, match=f"{type(module).__name__}: products: expected one of native, fp8, got 'int8'"):
        module.products = "int8"
    assert module.products == "native"
    assert pickle.loads(pickle.dumps(by_fp8(module))).products == copy.deepcopy(module).products == "fp8"
    module.products = "native"


def test_projectors_weights_are_quantised_once_until_one_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = by_fp8(projector(32, 48)), draw(5, 32)
    prepared: list[Tensor] = []
    prepare = fp8.prepare
    monkeypatch.setattr(fp8, "prepare", lambda w, b: (prepared.append(w), prepare(w, b))[1])
    with torch.no_grad():
        first = module(x)
        assert torch.equal(module(x), first) and len(prepared) == 2
        module[2].bias.add_(1)
        assert relative_error(module(x), first + 1) < 1e-5 and len(prepared) == 4


def test_projector_stays_native_where_it_must() -> None:
    module, x = projector(32, 48), draw(5, 32)
    native = module(x)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        under_autocast = module(x)
    gradient = torch.autograd.grad(native.sum(), module[0].weight)[0]
    by_fp8(module)
    with_gradient = module(x)
    assert torch.equal(with_gradient, native)
    assert torch.equal(torch.autograd.grad(with_gradient.sum(), module[0].weight)[0], gradient)
    with torch.no_grad():
        assert not torch.equal(module(x), native)
        assert torch.equal(module.train()(x), native)
        module.eval()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(module(x), under_autocast)
    assert torch.equal(module.requires_grad_(False)(x.requires_grad_()), native)


@pytest.fixture
def tower() -> STAB:
    return pair()[0].float()


def test_lste_by_fp8(tower: STAB) -> None:
    """Of 42 channels in the bottleneck."""
    x = draw(2, 4, 3, 5, DIM, dtype=torch.float64)
    with torch.no_grad():
        exact = encode(x, copy.deepcopy(tower.lmhra1).double(), copy.deepcopy(tower.dpe).double())
        found = lste_fp8.encode(x.float(), lste_fp8.prepare(tower.lmhra1, tower.dpe))
        assert found.shape == x.shape and found.dtype == torch.float32
        assert 1e-3 < relative_error(found, exact) < 0.06
        native = encode(x.float(), tower.lmhra1, tower.dpe)
        assert relative_error(native, exact) < 1e-6


def test_tower_by_request_alone(tower: STAB, monkeypatch: pytest.MonkeyPatch) -> None:
    x = pixels().float()
    calls: list[Tensor] = []
    encode_ = lste_fp8.encode
    monkeypatch.setattr(lste_fp8, "encode", lambda x, *rest, **named: (calls.append(x), encode_(x, *rest, **named))[1])
    with torch.no_grad():
        native = tower(x).tokens
        y = by_fp8(tower)(x).tokens
        assert y.dtype == torch.float32 and 1e-3 < relative_error(y, native) < 0.06 and len(calls) == 1
        alone = tower(x[1:]).tokens
        assert relative_error(y[len(y) - len(alone):], alone) < 1e-6 and len(calls) == 2
        tower.lmhra1.pos_embed[3].bias.add_(1)
        assert relative_error(tower(x).tokens, y) > 0.1 and len(calls) == 3
        tower(pixels(frames=1).float())
        with torch.autocast("cpu", torch.bfloat16):
            tower(x)
        tower.lmhra1.pos_embed[0].train()
        tower(x)
        tower.train()(x)
        tower.eval()
    tower(x).tokens.sum().backward()
    assert len(calls) == 3, "images, autocast, batch statistics, training mode and gradients are native"


# The errors that docs/numerics.md shows


def page_errors() -> dict[str, float]:
    """The page's last column."""
    written = fp8_errors.PAGE.read_text().partition("<!-- fp8 -->\n")[2].partition("<!-- /fp8 -->")[0]
    [header, _, *rows] = written.splitlines()
    assert header == fp8_errors.table({}).splitlines()[0]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {name: float(error) for name, *_, error in cells}


def test_errors_do_not_grow_beyond_the_pages() -> None:
    """On a small clip; and two products after one another err by four times a number's rounding, squared."""
    found, page = fp8_errors.errors(1, 8), page_errors()
    assert list(found) == list(page) == list(fp8_errors.ROWS)
    assert {name: (row, page[name]) for name, row in found.items() if not row["FP8"] < 1.1 * page[name]} == {}
    assert all(row["float32"] < 2e-6 and row["bfloat16"] < 8e-3 < row["FP8"] for row in found.values()), found
    assert found["projector"]["FP8"] < 1.05 * 4**0.5 * ROUNDING


# Tuning


def test_the_kernel_is_tuned_at_all_that_is_quantised() -> None:
    pytest.importorskip("triton")
    from panda_kernels.triton import _launch, resources
    from panda_kernels.triton import fp8 as kernels

    assert not list(cases.cases_of("fp8", "clips2", "triton", "cpu")), "no GPU, no e4m3"
    case = cases.fp8_case(torch.bfloat16, "", "cpu", tokens=(6, 64), bottleneck=(6, 42), hidden=(4, 96))
    assert all(error < HALF_UNIT for error in case.errors(case.exactly()))
    case = cases.tower_case(torch.float32, "", "auto", "cpu", "fp8", **cases.TOWER_SIZES["small"])
    with torch.no_grad():
        assert 1e-3 < case.errors(case.exactly())[0] < 0.1
    with _launch.recorded() as launches, lookup.observed() as session:
        for _, width in cases.FP8_SIZES["clips2"].values():
            kernels.quantise(torch.empty(2, width, device="meta"), width, gelu=False)
    assert len(session.seen) == 3 and {launch.args["K"] for launch in launches} == set(resources.QUANTISED)


# On a GPU


@pytest.mark.parametrize(("M", "K", "N"), [(1, 16, 16), (37, 682, 1024), (70, 45, 51)])
def test_layouts_are_those_that_a_gpu_multiplies(monkeypatch: pytest.MonkeyPatch, M: int, K: int, N: int) -> None:
    """As torch's checks for meta tensors, those of CUDA, have it; what dtype a bias has they do not check."""
    monkeypatch.setattr(fp8, "has_products", lambda device: True)
    rows, weight = fp8.quantise(torch.empty(M, K, device="meta")), fp8.prepare(torch.empty(N, K, device="meta"),
                                                                              torch.empty(N, device="meta"))
    assert weight.bias is not None and weight.bias.dtype == torch.bfloat16
    y = fp8.product(rows, weight, torch.float32)
    assert y.shape == (M, N) and y.dtype == torch.float32 and y.device.type == "meta"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gpu_agrees_with_the_emulation(dtype: torch.dtype) -> None:
    if not fp8.has_products(torch.device("cuda")):
        pytest.skip("this GPU does not multiply e4m3")
    for M, K, N in ((1, 1024, 682), (1092, 1024, 4096), (700, 4096, 4096), (4096, 682, 1024), (33, 45, 51)):
        x, w, b = draw(M, K, dtype=dtype), draw(N, K, seed=1, dtype=dtype, scale=K**-0.5), draw(N, seed=2, dtype=dtype)
        expected = fp8.product(fp8.quantise(x), fp8.prepare(w, b), torch.float64)
        rows, weight = fp8.quantise(x.cuda()), fp8.prepare(w.cuda(), b.cuda())
        assert torch.equal(bits(rows.values.cpu()), bits(fp8.quantise(x).values))
        y = fp8.product(rows, weight, dtype)
        assert y.dtype == dtype and y.shape == (M, N)
        # bfloat16's rounding of the result and of the bias, and what tensor cores cut off.
        assert relative_error(y.cpu(), expected) < 2**-8 + K / 32 * 2**-13
    module, x = by_fp8(lively(Projector(64, 96, dtype=dtype))).eval(), draw(70, 64, dtype=dtype)
    with torch.no_grad():
        expected = module(x)
        assert relative_error(module.cuda()(x.cuda()).cpu(), expected) < 2e-2
