"""The CUDA backend: on a GPU where there is one, else its kernels emulated (cuda_emulation.h), on CPU tensors."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from importlib import import_module
from typing import Any

import pytest
import torch
from op_cases import Buffers, assert_as_close_as_torch, cotangent, is_float
from torch import Tensor

from panda_kernels import backends
from panda_kernels.ops import SPECS
from panda_kernels.spec import Inputs

if torch.cuda.is_available():
    DEVICE, in_another_order = "cuda", nullcontext
else:
    import cuda_emulated

    DEVICE, in_another_order = "cpu", cuda_emulated.threads_backwards

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "depthwise_conv3d": {
        "stab": {"shape": (2, 4, 6, 5, 72)},
        "column_tiles": {"shape": (1, 2, 3, 18, 8)},
        "bands": {"shape": (1, 1, 19, 2, 8), "bias": False, "residual": False},
        "long_clip": {"shape": (1, 6, 2, 3, 16)},
        "three_frames": {"shape": (3, 3, 1, 1, 136)},
    },
}
CASES = [(op, case) for op, cases in SIZES.items() for case in cases]


@pytest.fixture(autouse=True)
def buffers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Buffers]:
    if DEVICE == "cuda" and (error := backends.load_error("cuda")):
        pytest.fail(error)
    buffers = Buffers()
    buffers.take_over(monkeypatch)
    yield buffers
    buffers.check_edges()


def inputs_of(op: str, case: str, dtype: torch.dtype) -> Inputs:
    values = SPECS[op].inputs(SIZES[op][case], dtype)
    return {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in values.items()}


def run(op: str, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
    """The result, and by name the gradients of the floating inputs."""
    module = import_module(f"panda_kernels.backends.cuda.{op}")
    y = module.fwd(*inputs.values())
    names = [name for name, value in inputs.items() if is_float(value)]
    return y, dict(zip(names, module.bwd(cotangent(y), *inputs.values(), needs=[True] * len(names)), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "case"), CASES)
def test_close_to_float64(op: str, case: str, dtype: torch.dtype, buffers: Buffers) -> None:
    inputs = buffers.inputs(inputs_of(op, case, dtype))
    assert_as_close_as_torch(SPECS[op], run(op, inputs), inputs, dtype)


@pytest.mark.parametrize(("op", "case"), CASES)
def test_another_run_in_another_order_has_the_same_bits(op: str, case: str) -> None:
    inputs = inputs_of(op, case, torch.bfloat16)
    y, grads = run(op, inputs)
    with in_another_order():
        again, grads_again = run(op, inputs)
    assert torch.equal(again, y) and all(torch.equal(grads_again[name], grad) for name, grad in grads.items())


def test_the_sum_with_another_tensor_is_that_of_the_result(buffers: Buffers) -> None:
    from panda_kernels.backends.cuda.depthwise_conv3d import stencil

    inputs = buffers.inputs(inputs_of("depthwise_conv3d", "stab", torch.float32))
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    y, total = stencil(x, weight, bias, residual=True, add=x)
    assert total is not None and torch.equal(total, y + x)


def test_what_it_does_not_serve() -> None:
    module = import_module("panda_kernels.backends.cuda.depthwise_conv3d")
    weight = torch.empty(9, 1, 1, 3, 3)
    reasons = module.refusals([torch.empty(1, 1, 2, 2, 9), weight, None, False])
    assert any("not 3 x 3 x 3" in reason for reason in reasons)
    assert any("not a multiple of 16 bytes" in reason for reason in reasons)
