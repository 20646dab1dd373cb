"""Calls of every op for the tests: its specification's sizes on every backend, device and dtype that serves them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import panda_kernels
from panda_kernels import backends
from panda_kernels.ops import SPECS
from panda_kernels.spec import Inputs, OpSpec, relative_error

OPS = sorted(SPECS)
USABLE = [name for name, error in backends.status().items() if error is None]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ON_CPU = [name for name in USABLE if name not in backends.ON_GPU]
HOMES = [pytest.param(name, "cuda" if name in backends.ON_GPU else "cpu", id=name,
                      marks=[pytest.mark.gpu] if name in backends.ON_GPU else []) for name in USABLE]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
GUARD = 64  # elements: keeps a buffer's alignment


def first_case(op: str) -> str:
    return next(iter(SPECS[op].test_sizes))


def make(op: str, case: str, dtype: torch.dtype, device: str = "cpu") -> Inputs:
    inputs = SPECS[op].inputs(SPECS[op].test_sizes[case], dtype)
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def served(backend: str, op: str, inputs: Inputs) -> bool:
    return not backends.refusals(backend, op, "fwd", list(inputs.values()))


def calls(*, dtypes: tuple[torch.dtype, ...] = DTYPES, first_only: bool = False) -> list[Any]:
    """``(backend, device, op, case, dtype)`` of every call that can be served here. torch must serve them all."""
    return list(_calls(dtypes, first_only))


def _calls(dtypes: tuple[torch.dtype, ...], first_only: bool) -> Iterator[Any]:
    for op in OPS:
        for case in [first_case(op)] if first_only else SPECS[op].test_sizes:
            for dtype in dtypes:
                for device in DEVICES:
                    inputs = make(op, case, dtype, device)
                    for backend in USABLE:
                        if backend == "torch" or served(backend, op, inputs):
                            name = f"{op}-{case}-{str(dtype).removeprefix('torch.')}-{backend}-{device}"
                            marks = [pytest.mark.gpu] if device == "cuda" else []
                            yield pytest.param(backend, device, op, case, dtype, id=name, marks=marks)


def result_dtype(op: str, dtype: torch.dtype) -> torch.dtype:
    """Statistics are never in half precision."""
    return torch.promote_types(dtype, torch.float32) if op == "batch_statistics" else dtype


def is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype.is_floating_point


def call(op: str, inputs: Inputs, backend: str) -> Tensor:
    return getattr(panda_kernels, op)(**inputs, backend=backend)


def cotangent(y: Tensor) -> Tensor:
    """Standard normal, the same numbers in every dtype."""
    values = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return values.bfloat16().to(y)


def with_gradients(function: Any, inputs: Inputs, grad: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """The result, and the gradients of every floating input by name; inputs keep their strides."""
    leaves = {name: value.detach().requires_grad_() if is_float(value) else value for name, value in inputs.items()}
    y = function(**leaves)
    floats = {name: value for name, value in leaves.items() if is_float(value)}
    grads = torch.autograd.grad(y, list(floats.values()), cotangent(y) if grad is None else grad)
    return y.detach(), dict(zip(floats, grads, strict=True))


def in_dtype(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Contiguous copies on the CPU, in ``dtype`` where they are floating."""
    return {name: value.detach().cpu().contiguous().to(dtype if is_float(value) else value.dtype)
            if isinstance(value, Tensor) else value for name, value in inputs.items()}


def assert_as_close_as_torch(spec: OpSpec, result: tuple[Tensor, dict[str, Tensor]], inputs: Inputs,
                             dtype: torch.dtype, grad: Tensor | None = None) -> None:
    """Errors against float64 within the specification's multiple of the reference's own in the same dtype.

    Nothing here is more exact than float64, so the reference's error in float64 is taken to be the one in
    float32, scaled by the two dtypes' precision.
    """
    reference = spec.load_reference()
    measured = torch.float32 if dtype == torch.float64 else dtype
    unit = torch.finfo(dtype).eps / torch.finfo(measured).eps

    def in_reference(precision: torch.dtype, onednn: bool) -> tuple[Tensor, dict[str, Tensor]]:
        cotangent_ = None if grad is None else grad.detach().cpu().contiguous().to(precision)
        with torch.backends.mkldnn.flags(enabled=onednn, allow_tf32=None):
            return with_gradients(reference, in_dtype(inputs, precision), cotangent_)

    exact, exact_grads = in_reference(torch.float64, True)
    # The better of two, as oneDNN's bfloat16 depthwise weight gradient holds uninitialised memory on grids smaller
    # than the kernel (torch 2.13) and would allow anything.
    yardsticks = [in_reference(measured, onednn) for onednn in (True, False)]
    y, grads = result
    errors = {"forward": (y, exact, [plain for plain, _ in yardsticks], False)}
    errors |= {f"gradient of {n}": (grads[n], exact_grads[n], [plain[n] for _, plain in yardsticks], True)
               for n in exact_grads}
    for what, (ours, exactly, theirs, backward) in errors.items():
        error, torch_error = relative_error(ours.cpu(), exactly), unit * min(relative_error(t, exactly) for t in theirs)
        coarser = max(dtype, ours.dtype, key=lambda d: torch.finfo(d).eps)
        limit = spec.tolerance.limit(torch_error, coarser, backward=backward)
        assert error <= limit, f"{spec.name} {what}: error {error:.2e}, torch's own {torch_error:.2e}"


class Buffers:
    """Memory that starts as NaN, in the middle of larger pieces that do too and that no kernel may touch."""

    def __init__(self) -> None:
        self.wholes: list[Tensor] = []
        self.begins = self.ends = np.zeros(0, np.uint64)

    def like(self, t: Tensor) -> Tensor:
        poison = torch.nan if is_float(t) else True if t.dtype == torch.bool else torch.iinfo(t.dtype).max
        self.wholes.append(torch.full((t.numel() + 2 * GUARD,), poison, dtype=t.dtype, device=t.device))
        return self.wholes[-1][GUARD:-GUARD].view(t.shape)

    def inputs(self, inputs: Inputs) -> Inputs:
        return {name: self.like(value).copy_(value) if isinstance(value, Tensor) else value
                for name, value in inputs.items()}

    def edges(self) -> Iterator[Tensor]:
        for whole in self.wholes:
            yield from (whole[:GUARD], whole[-GUARD:])

    def take_over(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """From now on whatever a backend allocates or copies lies in such memory."""
        def allocate(original: Any, *args: Any, **kwargs: Any) -> Tensor:
            t = original(*args, **kwargs)
            return self.like(t) if t.numel() else t

        for name in ("empty", "empty_like"):
            monkeypatch.setattr(torch, name, partial(allocate, getattr(torch, name)))
        copy = Tensor.contiguous
        monkeypatch.setattr(Tensor, "contiguous", lambda t: self.like(t).copy_(copy(t)))

    def check_edges(self) -> None:
        assert all(edge.isnan().all() if is_float(edge) else (edge == edge[0]).all() for edge in self.edges())

    def check(self, addresses: Any) -> None:
        if len(self.begins) != 2 * len(self.wholes):
            bounds = sorted((e.data_ptr(), e.data_ptr() + GUARD * e.element_size()) for e in self.edges())
            self.begins, self.ends = np.array(bounds, np.uint64).T
        before = np.searchsorted(self.begins, addresses.astype(np.uint64), "right") - 1
        assert not ((before >= 0) & (addresses < self.ends[before])).any(), "a load from beside a buffer"
