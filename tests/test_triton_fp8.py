"""FP8's Triton kernels beside the emulation: compiled where a GPU has e4m3, else in the repaired interpreter."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from test_triton_ops import DEVICE, Buffers, buffers  # noqa: F401 - a fixture for every test

from panda_kernels import fp8
from panda_kernels.spec import Draw, relative_error

if DEVICE == "cuda" and not fp8.has_products(torch.device("cuda")):
    pytest.skip("this GPU does not multiply e4m3", allow_module_level=True)

from panda_kernels.triton.fp8 import quantise
from panda_kernels.triton.local_encoding import over_time, quantised_over_time
from panda_kernels.triton.matmul import multiply_scaled


def draw(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return Draw(0, dtype)(*shape, scale=scale)


def bits(t: Tensor) -> Tensor:
    return t.view(torch.uint8)


def awkward(K: int, dtype: torch.dtype) -> Tensor:
    """Rows of usual, tiny, huge, zero and subnormal numbers, and two that are not finite."""
    x = draw(9, K, dtype=torch.float64)
    x *= torch.tensor([1, 1e-30, 1e30, 0, 1e-40, 3, 1, 1, 1e-3]).double()[:, None]
    x[6, K // 2], x[7, 0] = torch.nan, -torch.inf
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("K", [16, 100, 682, 1152])
def test_kernel_has_the_emulations_bits(K: int, dtype: torch.dtype, buffers: Buffers) -> None:  # noqa: F811
    x = awkward(K, dtype)
    given = buffers.like(x.to(DEVICE)).copy_(x)
    values, scales = (t.cpu() for t in quantise(given, K + -K % 16, gelu=False))
    expected = fp8.quantise(x)
    finite = torch.arange(9)[:, None].ne(torch.tensor([6, 7])).all(1)
    assert torch.equal(bits(values)[finite], bits(expected.values)[finite])
    assert torch.equal(scales[finite], expected.scales[finite])
    assert values[~finite, :K].float().isnan().all() and scales[~finite].isnan().all()


def test_kernels_gelu() -> None:
    """Up to the last bits of two erf: e4m3 shows them in ties, and where little is left of ``1 + erf``."""
    x = draw(5, 300, scale=2.0, dtype=torch.bfloat16)
    values, scales = (t.cpu() for t in quantise(x.to(DEVICE), 304, gelu=True))
    expected = fp8.quantise(x, gelu=True)
    torch.testing.assert_close(scales, expected.scales, rtol=1e-6, atol=0)
    assert (bits(values) != bits(expected.values)).float().mean() < 1e-2
    torch.testing.assert_close(values.float(), expected.values.float(), rtol=2.0**-3, atol=2.0**-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("frames", "width"), [(1, 48), (2, 16), (3, 704), (4, 80), (5, 1040)])
def test_a_convolution_is_quantised_unrounded(frames: int, width: int, dtype: torch.dtype,
                                              buffers: Buffers) -> None:  # noqa: F811
    """The bits of float32's convolution and a quantisation after it, whatever a program's other rows hold."""
    clips, positions = 2, 7
    inner, rows = draw(clips * frames * positions, width, dtype=dtype), draw(5, width, dtype=torch.float32)
    inner[::5] *= 1e-3
    inner[3], inner[4, width // 2], inner[-1, 0] = 0, torch.nan, torch.inf
    both = torch.cat([torch.full_like(inner, 7), inner], 1).to(DEVICE)
    wider = buffers.like(both).copy_(both)
    values, scales = (t.cpu() for t in quantised_over_time(wider[:, width:], rows.to(DEVICE), frames, positions))
    precise = over_time(inner.float().to(DEVICE), rows.to(DEVICE), frames, positions).cpu()
    expected, finite = fp8.quantise(precise), precise.isfinite().all(1)
    assert 0 < (~finite).sum() <= min(frames, 2) + min(frames, 3)
    assert torch.equal(bits(values)[finite], bits(expected.values)[finite])
    assert torch.equal(scales[finite], expected.scales[finite])
    assert scales[~finite].isnan().all() and values[~finite].float().isnan().all()
    w = rows.double()
    x = F.pad((inner.double() + w[0]).view(clips, frames, positions, width), (0, 0, 0, 0, 1, 1))
    exact = (w[1] * x[:, :-2] + w[2] * x[:, 1:-1] + w[3] * x[:, 2:] + w[4]).flatten(0, 2)
    assert relative_error(precise[finite], exact[finite]) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("M", "K", "N"), [(1, 16, 16), (37, 208, 51), (1161, 48, 133), (130, 704, 140)])
def test_product_close_to_the_emulation(M: int, K: int, N: int, dtype: torch.dtype,
                                        buffers: Buffers) -> None:  # noqa: F811
    """Before the bias and the residual, columns of a wider matrix: with several tiles either way, and a row of NaN."""
    x, bias = draw(M, K), draw(N, scale=3.0).to(dtype)
    x[M // 2, 1] = torch.nan
    rows, weight = fp8.quantise(x), fp8.prepare(draw(N, K, scale=K**-0.5) * torch.linspace(0.1, 10, N)[:, None])
    residual = torch.cat([draw(M, N), torch.full((M, 3), torch.nan).double()], 1).to(dtype)
    given = [t.to(DEVICE) for t in (*rows, weight.values, weight.scales, bias)]
    y = multiply_scaled(*given, buffers.like(residual.to(DEVICE)).copy_(residual)[:, :N]).cpu()
    expected = fp8.product(rows, weight, torch.float64) + bias.double() + residual[:, :N].double()
    others = torch.arange(M) != M // 2
    assert y.dtype == dtype and y.shape == (M, N) and y[M // 2].isnan().all()
    # On a GPU, what its tensor cores cut off.
    summed = K / 32 * 2**-13 if DEVICE == "cuda" else 1e-6
    assert M == 1 or relative_error(y[others], expected[others]) < torch.finfo(dtype).eps / 2 + summed
