"""The CUDA kernel of window_attention_pool, blocks and threads emulated on the CPU (cuda_emulation.h)."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import cuda_emulated
import pytest
import torch
from torch import Tensor

from panda_kernels.spec import Tolerance, relative_error

DTYPES = {torch.bfloat16: 1, torch.float16: 2}  # as device.h counts them
GUARD = 64  # rows before and after the result: as many as a block has windows

@pytest.fixture(scope="module")
def attend() -> Any:
    function = cuda_emulated.library.attend
    function.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 8, ctypes.c_int64, *[ctypes.c_int] * 3, ctypes.c_float,
                         *[ctypes.c_int] * 2]
    return function


class Call(NamedTuple):
    x: Tensor  # [h, w, C]
    places: Tensor
    q: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    wkv: Tensor
    heads: int
    scale: float


def make(windows: int, C: int, heads: int, dtype: torch.dtype) -> Call:
    """Windows lie anywhere, in no order; tokens have means of their own. Logits differ by several units."""
    generator = torch.Generator().manual_seed(windows + C)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    h, w = 6, 7
    places = torch.randint(h - 1, [windows], generator=generator) * w + torch.randint(w - 1, [windows],
                                                                                      generator=generator)
    x = normal(h, w, C) * (1 + normal(h, w, 1).abs()) + normal(h, w, 1)
    return Call(x.to(dtype), places, normal(windows, C).to(dtype), (1 + normal(C) / 4).to(dtype),
                (normal(C) / 4).to(dtype), (normal(2 * C, C) * C**-0.5).to(dtype), heads, 2 * (C // heads)**-0.5)


def tokens(call: Call) -> Tensor:
    """``[W, 4, C]``."""
    w = call.x.shape[1]
    return call.x.flatten(0, 1)[call.places[:, None] + torch.tensor([0, 1, w, w + 1])]


def plain(call: Call, dtype: torch.dtype) -> Tensor:
    """The heads' outputs by the definition, in ``dtype``."""
    x, q, norm_weight, norm_bias, wkv = (t.to(dtype) for t in (tokens(call), *call[2:6]))
    windows, C = q.shape
    normed = torch.nn.functional.layer_norm(x, [C], norm_weight, norm_bias, 1e-5)
    k, v = (normed @ wkv.T).view(windows, 4, 2, call.heads, -1).unbind(2)
    logits = torch.einsum("whd,wshd->whs", q.view(windows, call.heads, -1), k) * call.scale
    return torch.einsum("whs,wshd->whd", logits.softmax(-1), v).reshape(windows, C)


def run(attend: Any, call: Call, backwards: bool, shared_memory: int) -> Tensor:
    windows, C = call.q.shape
    wide = tokens(call).double()
    norms = torch.stack([wide.mean(-1), (wide.var(-1, unbiased=False) + 1e-5).rsqrt()]).transpose(1, 2)
    norms = norms.float().contiguous()
    guarded = torch.full([windows + 2 * GUARD, C], float("nan"), dtype=call.q.dtype)
    out = guarded[GUARD:-GUARD]
    arguments = [call.x, call.places, norms, *call[2:6], out]
    error = attend(DTYPES[call.q.dtype], *(t.data_ptr() for t in arguments), windows, call.x.shape[1], C, call.heads,
                   call.scale, backwards, shared_memory)
    assert error == 0
    assert guarded[:GUARD].isnan().all() and guarded[-GUARD:].isnan().all()
    return out


# Devices with 227 KB keep all chunks of tokens of these; with 99 KB, and less still, some are read again, and only two
# chunks of weights are on their way.
@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize(("windows", "C", "heads", "dtype", "kilobytes"), [
    pytest.param(33, 128, 8, torch.bfloat16, 227, id="padded-head"),
    pytest.param(1, 64, 2, torch.float16, 227, id="one-window"),
    pytest.param(65, 192, 4, torch.float16, 72, id="48-of-64-columns"),
    pytest.param(64, 256, 2, torch.bfloat16, 227, id="1024-wide-heads"),
    pytest.param(30, 256, 2, torch.bfloat16, 99, id="1024-wide-heads-small-device"),
    pytest.param(20, 288, 2, torch.float16, 163, id="1152-wide-heads"),
    pytest.param(33, 352, 2, torch.bfloat16, 163, id="1408-wide-heads"),
    pytest.param(33, 352, 2, torch.float16, 99, id="1408-wide-heads-small-device"),
])
def test_as_close_as_torch(attend: Any, windows: int, C: int, heads: int, dtype: torch.dtype, kilobytes: int,
                           backwards: bool) -> None:
    call = make(windows, C, heads, dtype)
    exact = plain(call, torch.float64)
    error = relative_error(run(attend, call, backwards, kilobytes * 1024), exact)
    torch_error = relative_error(plain(call, dtype), exact)
    assert error <= Tolerance().limit(torch_error, dtype), f"{error:.2e}, torch's own {torch_error:.2e}"


def test_a_nan_stays_in_its_windows(attend: Any) -> None:
    call = make(9, 64, 2, torch.bfloat16)
    call.x.view(-1, 64)[call.places[4]] = float("nan")
    seen = tokens(call).isnan().any(-1).any(-1)
    assert seen.any() and not seen.all()
    assert torch.equal(run(attend, call, False, 227 * 1024).isnan(), seen[:, None].expand(-1, 64))


@pytest.mark.parametrize(("dtype", "C", "heads"), [(0, 64, 2), (1, 64, 1), (1, 48, 2), (1, 96, 4), (1, 384, 2)],
                         ids=["float32", "odd-heads", "half-a-chunk", "narrow-heads", "wide-heads"])
def test_what_is_not_served_is_refused(attend: Any, dtype: int, C: int, heads: int) -> None:
    assert attend(dtype, *[None] * 8, 1, 4, C, heads, 1.0, 0, 227 * 1024) == 1
