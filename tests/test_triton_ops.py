"""Every Triton op, forward and backward: compiled where there is a GPU, else in the repaired interpreter.

What the op's schema adds around a backend is tested with the others; here its ``fwd`` and ``bwd`` are called.
"""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from op_cases import GUARD, OPS, Buffers, assert_as_close_as_torch, cotangent, is_float, make, result_dtype
from test_ops import LAYOUTS, SEVERAL, Layout, sample
from torch import Tensor

from panda_kernels.ops import SPECS
from panda_kernels.spec import Inputs
from panda_kernels.tuning import lookup

pytest.importorskip("triton")
if not torch.cuda.is_available():
    import triton_interpreter  # noqa: F401
    from triton.runtime.interpreter import InterpreterBuilder

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PORTED = [op for op in OPS if find_spec(f"panda_kernels.backends.triton.{op}")]
# Sizes that the specification's do not reach: several tiles along every axis, several tiles a program.
MORE_SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "assemble_tokens": {"many_frames": {"corners": ((0, 2, 0, 2),) * 33 + ((1, 5, 0, 7),), "channels": 130}},
    "attention_pool": {"pieces": {"batch": 2, "tokens": 300, "channels": 150, "queries": 9},
                       "many_pieces": {"batch": 1, "tokens": 4130, "channels": 8, "queries": 1},
                       "long_samples": {"lengths": (290, 0, 31, 513), "channels": 136, "queries": 2},
                       "many_samples": {"lengths": (2, 0, 0, 0, 0) * 26, "channels": 8, "queries": 1}},
    "batch_statistics": {"shares": {"shape": (1100, 130)}},
    "depthwise_conv3d": {"tiles": {"shape": (5, 2, 5, 17, 8), "kernel": (1, 1, 3)},
                         "channel_tiles": {"shape": (1, 1, 1, 2, 150), "kernel": (1, 1, 1)}},
    "local_encoding": {"tiles": {"shape": (2, 2, 7, 5, 100)}, "long_clip": {"shape": (1, 5, 1, 2, 24)}},
    "patch_embed": {"wide": {"shape": (1, 2, 16, 160), "channels": 3},
                    "many_patches": {"shape": (2, 1, 5, 35), "channels": 5, "patch": 1, "planes": 5}},
    "token_mlp": {"tiles": {"shape": (1100, 8), "hidden": 130}},
    "window_attention_pool": {"many_frames": {"grid": (2, 3), "corners": ((0, 2, 0, 3),) * 65 + ((0, 2, 1, 3),),
                                              "channels": 34, "num_heads": 1},
                              "two_heads": {"grid": (3, 35), "corners": ((0, 2, 1, 35),), "channels": 66,
                                            "num_heads": 2},
                              "head_of_144": {"grid": (2, 5), "corners": ((0, 2, 0, 5),), "channels": 144,
                                              "num_heads": 1},
                              "head_of_178": {"grid": (2, 5), "corners": ((0, 2, 1, 5),), "channels": 178,
                                              "num_heads": 1}},
}
CASES = [(op, case) for op in PORTED for case in (*SPECS[op].test_sizes, *MORE_SIZES.get(op, {}))]
LAST = [(op, list(SPECS[op].test_sizes)[-1]) for op in PORTED]


def inputs_of(op: str, case: str, dtype: torch.dtype) -> Inputs:
    if case not in MORE_SIZES.get(op, {}):
        return make(op, case, dtype, DEVICE)
    values = SPECS[op].inputs(MORE_SIZES[op][case], dtype)
    return {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in values.items()}


@contextmanager
def poisoned() -> Iterator[Buffers]:
    """Whatever a backend allocates or copies lies in such memory; the interpreter also tells what is only read."""
    buffers = Buffers()
    with pytest.MonkeyPatch.context() as patch:
        buffers.take_over(patch)
        if DEVICE == "cpu":
            load = InterpreterBuilder.create_masked_load

            def checked_load(builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
                buffers.check(pointers.data[mask.data.astype(bool)])
                return load(builder, pointers, mask, *rest)

            patch.setattr(InterpreterBuilder, "create_masked_load", checked_load)
        yield buffers
    buffers.check_edges()


@pytest.fixture(autouse=True)
def buffers() -> Iterator[Buffers]:
    with poisoned() as buffers:
        yield buffers


def run(op: str, inputs: Inputs, grad: Tensor | None = None) -> tuple[Tensor, dict[str, Any]]:
    """The result, and by name the gradients of the floating inputs."""
    y = import_module(f"panda_kernels.backends.triton.{op}").fwd(*inputs.values())
    return y, gradients(op, inputs, cotangent(y) if grad is None else grad)


def gradients(op: str, inputs: Inputs, grad: Tensor, only: str | None = None) -> dict[str, Any]:
    """By name, of the floating inputs, or of the one named ``only``."""
    tensors = [name for name, value in inputs.items() if isinstance(value, Tensor)]
    needs = [is_float(inputs[name]) and only in (None, name) for name in tensors]
    grads = import_module(f"panda_kernels.backends.triton.{op}").bwd(grad, *inputs.values(), needs=needs)
    return {name: g for name, g, needed in zip(tensors, grads, needs, strict=True) if needed}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("op", "case"), CASES)
def test_close_to_float64(op: str, case: str, dtype: torch.dtype, buffers: Buffers) -> None:
    inputs = buffers.inputs(inputs_of(op, case, dtype))
    y, grads = run(op, inputs)
    assert any(y.data_ptr() == whole[GUARD:].data_ptr() for whole in buffers.wholes), "not from torch.empty[_like]"
    assert y.dtype == result_dtype(op, dtype) and y.is_contiguous()
    assert all(grad.dtype == inputs[name].dtype and grad.shape == inputs[name].shape for name, grad in grads.items())
    assert_as_close_as_torch(SPECS[op], (y, grads), inputs, dtype)


@pytest.mark.parametrize(("op", "case"), [(op, case) for op in PORTED for case in SPECS[op].test_sizes])
def test_close_to_float64_in_float16(op: str, case: str, buffers: Buffers) -> None:
    inputs = buffers.inputs(inputs_of(op, case, torch.float16))
    assert_as_close_as_torch(SPECS[op], run(op, inputs), inputs, torch.float16)


@pytest.mark.skipif(DEVICE == "cuda", reason="not every device has the shared memory for the largest tiles")
@pytest.mark.parametrize(("op", "case"), LAST)
def test_close_to_float64_at_the_largest_that_can_be_tuned(op: str, case: str) -> None:
    inputs = inputs_of(op, case, torch.float32)
    with lookup.observed() as session:
        run(op, inputs)
        for point, heuristic in session.seen.items():
            values = {name: max(values) for name, values in point.space.values.items()}
            session.wanted[point] = replace(heuristic, **values)
        result = run(op, inputs)
    assert_as_close_as_torch(SPECS[op], result, inputs, torch.float32)


@pytest.mark.parametrize(("layout", "grad_layout"), LAYOUTS)
@pytest.mark.parametrize(("op", "case"), LAST)
def test_any_layout(op: str, case: str, layout: Layout, grad_layout: Layout) -> None:
    inputs = {name: layout(value) if isinstance(value, Tensor) and value.dtype != torch.bool else value
              for name, value in inputs_of(op, case, torch.float32).items()}
    grad = grad_layout(cotangent(import_module(f"panda_kernels.backends.triton.{op}").fwd(*inputs.values())))
    assert_as_close_as_torch(SPECS[op], run(op, inputs, grad), inputs, torch.float32, grad)


@pytest.mark.parametrize(("op", "case"), LAST)
def test_two_runs_give_the_same_bits_and_one_gradient_those_of_all(op: str, case: str) -> None:
    inputs = inputs_of(op, case, torch.bfloat16)
    y, grads = run(op, inputs)
    module = import_module(f"panda_kernels.backends.triton.{op}")
    assert torch.equal(module.fwd(*inputs.values()), y)
    for name, grad in grads.items():
        alone = gradients(op, inputs, cotangent(y), only=name)
        assert list(alone) == [name] and torch.equal(alone[name], grad)


@pytest.mark.parametrize(("op", "case"), [(op, case) for op, case in SEVERAL if op in PORTED])
def test_alone_or_beside_nan_the_same_bits(op: str, case: str) -> None:
    inputs = inputs_of(op, case, torch.bfloat16)
    changed, where, out = sample(op, inputs, 1)
    batch = dict(inputs)
    for name, own in where.items():
        if is_float(inputs[name]):
            batch[name] = torch.full_like(inputs[name], torch.nan)
            batch[name][own] = inputs[name][own]
    alone = inputs | {name: inputs[name][own] for name, own in where.items()} | changed
    y, grads = run(op, batch)
    grad = cotangent(y)
    expected, expected_grads = run(op, {n: v.to(DEVICE) if isinstance(v, Tensor) else v for n, v in alone.items()},
                                   grad[out])
    assert torch.equal(y[out], expected)
    for name, own in where.items():
        if name in grads:
            assert torch.equal(grads[name][own], expected_grads[name]), name
