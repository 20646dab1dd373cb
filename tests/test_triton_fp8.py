"""FP8's Triton kernel has the emulation's bits: compiled where a GPU has e4m3, else in the repaired interpreter."""
from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from test_triton_ops import DEVICE, Buffers, buffers  # noqa: F401 - a fixture for every test

from panda_kernels import fp8
from panda_kernels.spec import Draw

if DEVICE == "cuda" and not fp8.has_products(torch.device("cuda")):
    pytest.skip("this GPU does not multiply e4m3", allow_module_level=True)

from panda_kernels.triton.fp8 import quantise


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
