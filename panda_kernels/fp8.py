"""Products in FP8, for inference and by request alone: e4m3, scales by row of tokens and by output channel.

A row of tokens is divided by its scale, a 448th of its largest magnitude, and rounded to e4m3: four significant bits,
nothing above 448. So is a row of a weight, an output channel, once. A product sums the products of such numbers over K,
multiplies the sum by both scales, adds the bias and rounds. docs/numerics.md has what that costs beside bfloat16.

An NVIDIA GPU of capability 8.9 or later does it by ``torch._scaled_mm``. Elsewhere the same arithmetic is emulated,
slowly, so that its numerics can be tested there: the sums are in float64, where those of up to 2**17 products of e4m3
are exact and depend on no order. The GPU's sums are the vendor's, who cuts them by the number of rows: there, unlike
elsewhere in this library, the last bits of a row may depend on its company.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends
from .backends import triton as backend
from .checks import Checks

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
SMALLEST_SCALE = 2.0**-126  # normal, as is its inverse
MULTIPLE = 16  # of which tensor cores want K and N
PRODUCTS = ("native", "fp8")


class Fp8Rows(NamedTuple):
    """Tokens: ``values`` e4m3 ``[M, K']``, K' the next multiple of 16, zero beyond K; ``scales`` float32 ``[M, 1]``."""

    values: Tensor
    scales: Tensor


class Fp8Weight(NamedTuple):
    """A weight: ``values`` e4m3 ``[N', K']``, ``scales`` float32 ``[1, N']``, ``bias`` ``[N']`` or None.

    N' and K' are the next multiples of 16, ``channels`` is N; what is added is zero.
    """

    values: Tensor
    scales: Tensor
    bias: Tensor | None
    channels: int


def quantise(x: Tensor, *, gelu: bool = False) -> Fp8Rows:
    """Rows of ``x``, or of its exact GELU, in e4m3 with a scale each: ``x = values * scales`` up to rounding.

    The scale is ``max|row| / 448``, at least ``2**-126``, which a row of zeros has. A row that holds an infinity or a
    NaN has the scale NaN and becomes NaN throughout, so that no infinity ends as a finite number. No row depends on
    another.

    Args:
        x: ``[..., K]``, any floating dtype, any strides; float64 is rounded to float32 first.
        gelu: apply the exact (erf) GELU first, in float32.

    Raises:
        ValueError: an empty tensor or a scalar.
        TypeError: a dtype that is not floating.
    """
    check = Checks("fp8.quantise")
    if x.ndim < 1:
        check.fail("x", "shape [..., K]", "a scalar")
    check.not_empty("x", x)
    check.floating("x", x)
    rows = x.detach().reshape(-1, x.shape[-1])
    more = -rows.shape[1] % MULTIPLE
    if has_products(x.device) and backends.load_error("triton") is None and not backend.refusals([rows]):
        from .triton.fp8 import quantise as by_one_kernel

        return Fp8Rows(*by_one_kernel(rows.contiguous(), rows.shape[1] + more, gelu=gelu))
    values = F.gelu(rows.float()) if gelu else rows.float()
    largest = values.abs().amax(1, keepdim=True)
    scales = torch.where(largest.isfinite(), (largest / LARGEST).clamp_min(SMALLEST_SCALE), torch.nan)
    # One division a row instead of one a number: what is rounded twice exceeds 448 by too little for e4m3 to notice.
    return Fp8Rows(F.pad(values * scales.reciprocal(), (0, more)).to(E4M3), scales)


def prepare(weight: Tensor, bias: Tensor | None = None) -> Fp8Weight:
    """A weight ``[N, K]`` and its bias ``[N]`` for :func:`product`, for callers who keep them."""
    channels = weight.shape[0]
    more = -channels % MULTIPLE
    values, scales = quantise(F.pad(weight.detach(), (0, 0, 0, more)))
    if bias is not None:  # the GPU's products take it in the dtype of their result
        dtype = torch.bfloat16 if has_products(weight.device) else torch.float32
        bias = F.pad(bias.detach(), (0, more)).to(dtype)
    return Fp8Weight(values, scales.T.contiguous(), bias, channels)


def product(rows: Fp8Rows, weight: Fp8Weight, dtype: torch.dtype) -> Tensor:
    """``rows weight^T + bias``, ``[M, N]`` in ``dtype``; on a GPU rounded to bfloat16 first.

    A GPU sums in its tensor cores alone. Hopper's keep 13 bits after the point and cut the rest off, every 32 products:
    less than ``K / 32 * 2**-13`` of the largest partial sum, beside the 2**-5 that a number loses on its way to e4m3.
    To add up in float32 every so many products instead is reported to be much slower (pytorch issue 147971).

    Raises:
        ValueError: rows of another K than the weight's.
    """
    Checks("fp8.product").shape("rows.values", rows.values, ("M", weight.values.shape[1]))
    if has_products(rows.values.device):
        y = torch._scaled_mm(rows.values, weight.values.T, rows.scales, weight.scales, bias=weight.bias,
                             out_dtype=torch.bfloat16, use_fast_accum=True)
    else:
        y = (rows.values.double() @ weight.values.double().T).mul_(rows.scales).mul_(weight.scales)
        y = y if weight.bias is None else y.add_(weight.bias)
    return y[:, :weight.channels].to(dtype).contiguous()


def has_products(device: torch.device) -> bool:
    """Whether a device multiplies e4m3: an NVIDIA GPU of capability 8.9 or later."""
    return (device.type == "cuda" and torch.version.hip is None
            and torch.cuda.get_device_capability(device) >= (8, 9))


class HasProducts:
    """A module's attribute ``products``, one of :data:`PRODUCTS`; setting another name raises ValueError."""

    @property
    def products(self) -> str:
        return self._products

    @products.setter
    def products(self, name: str) -> None:
        if name not in PRODUCTS:
            raise ValueError(f"{type(self).__name__}: products: expected one of {', '.join(PRODUCTS)}, got {name!r}")
        self._products = name
