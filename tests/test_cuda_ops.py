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
    import triton_interpreter  # noqa: F401 - for what Triton does around a kernel

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
    "window_attention_pool": {
        "ragged": {"grid": (5, 6), "corners": ((0, 5, 1, 5), (1, 3, 0, 6)), "channels": 64, "num_heads": 2},
    },
}
SERVED = {"window_attention_pool": [torch.bfloat16, torch.float16]}
CASES = [(op, case, dtype) for op, cases in SIZES.items() for case in cases for dtype in SERVED.get(op, DTYPES)]


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
    """The result, and by name the gradients of the floating inputs; Triton's where there is no kernel for them."""
    module = import_module(f"panda_kernels.backends.cuda.{op}")
    y = module.fwd(*inputs.values())
    if not hasattr(module, "bwd"):
        module = import_module(f"panda_kernels.backends.triton.{op}")
    tensors = {name: is_float(value) for name, value in inputs.items() if isinstance(value, Tensor)}
    grads = module.bwd(cotangent(y), *inputs.values(), needs=list(tensors.values()))
    return y, {name: grad for (name, needed), grad in zip(tensors.items(), grads, strict=True) if needed}


@pytest.mark.parametrize(("op", "case", "dtype"), CASES)
def test_close_to_float64(op: str, case: str, dtype: torch.dtype, buffers: Buffers) -> None:
    inputs = buffers.inputs(inputs_of(op, case, dtype))
    assert_as_close_as_torch(SPECS[op], run(op, inputs), inputs, dtype)


@pytest.mark.parametrize(("op", "case", "dtype"), [case for case in CASES if case[2] == torch.bfloat16])
def test_another_run_in_another_order_has_the_same_bits(op: str, case: str, dtype: torch.dtype) -> None:
    inputs = inputs_of(op, case, dtype)
    y, grads = run(op, inputs)
    with in_another_order():
        again, grads_again = run(op, inputs)
    assert torch.equal(again, y) and all(torch.equal(grads_again[name], grad) for name, grad in grads.items())


def test_what_it_does_not_serve() -> None:
    module = import_module("panda_kernels.backends.cuda.depthwise_conv3d")
    weight = torch.empty(9, 1, 1, 3, 3)
    reasons = module.refusals([torch.empty(1, 1, 2, 2, 9), weight, None, False])
    assert any("not 3 x 3 x 3" in reason for reason in reasons)
    assert any("not a multiple of 16 bytes" in reason for reason in reasons)
    unserved = import_module("panda_kernels.backends.cuda.window_attention_pool").unserved
    assert unserved(torch.bfloat16, 1024, 8, 2) == unserved(torch.float16, 1408, 8, 2) == []
    for case in ((torch.float32, 1024, 8, 2), (torch.bfloat16, 1024, 8, 3), (torch.bfloat16, 1408, 11, 2),
                 (torch.bfloat16, 1000, 8, 2)):
        assert len(unserved(*case)) == 1, case
