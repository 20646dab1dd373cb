"""The calls that a tuner times: every op at a size of its specification, the whole tower, and FP8's quantisation and
tower, with what each must give."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends, fp8, ops
from ..nn import STAB
from ..rectangles import Rectangles
from ..spec import Draw, OpSpec, Tolerance
from ..verify import TOWER, arguments, error_beside, in_float64, refusals, seeded_tower

DTYPES = (torch.float32, torch.bfloat16)
TOWER_SIZES = {
    "clips2": {"dim": 1024, "clips": 2, "frames": 4, "patches": 32},
    "image": {"dim": 1024, "clips": 1, "frames": 1, "patches": 32},
    "clip": {"dim": 1024, "clips": 1, "frames": 4, "patches": 32},
    "clips4": {"dim": 1024, "clips": 4, "frames": 4, "patches": 32},
    "small": {"dim": 64, "clips": 1, "frames": 4, "patches": 4},
}
FP8 = "fp8"
# Rows of what is quantised: LSTE's tokens and its bottleneck, and the projector's hidden layer.
FP8_SIZES = {"clips2": {"tokens": (8192, 1024), "bottleneck": (8192, 688), "hidden": (2184, 4096)}}
PATCH, WINDOW = 14, 2


@dataclass(frozen=True)
class Case:
    """A call, and how to compute the same in float64."""

    label: str
    call: Callable[[], Sequence[Tensor]]
    exactly: Callable[[], Sequence[Tensor]]
    dtype: torch.dtype
    tolerance: Tolerance
    backward: bool

    def errors(self, exact: Sequence[Tensor]) -> list[float]:
        """Of each result of the call, relative to what it must give."""
        scale = max(float(t.norm()) for t in exact)
        return [error_beside(given, wanted, scale) for given, wanted in zip(self.call(), exact, strict=True)]

    def limits(self, errors: Sequence[float]) -> list[float]:
        """What another config of the same kernels may err, where one has these errors."""
        return [self.tolerance.limit(error, self.dtype, backward=self.backward) for error in errors]


def names() -> tuple[str, ...]:
    return (*ops.SPECS, TOWER, FP8)


def sizes_of(op: str) -> dict[str, Any]:
    """The sizes an op can be tuned at, by name; the first is what it is tuned at unless told otherwise."""
    if op == TOWER:
        return dict(TOWER_SIZES)
    if op == FP8:
        return dict(FP8_SIZES)
    return {**ops.SPECS[op].bench_sizes, **ops.SPECS[op].test_sizes}


def cases_of(op: str, size: str, backend: str, device: str) -> Iterator[Case]:
    """Forward and backward in each dtype, as far as the backend serves them."""
    for dtype in DTYPES:
        label = f"{op} {size} {str(dtype).removeprefix('torch.')}"
        if op == FP8:
            if fp8.has_products(torch.device(device)):
                yield fp8_case(dtype, label, device, **FP8_SIZES[size])
                yield tower_case(dtype, f"{label} tower", backend, device, FP8, **TOWER_SIZES[size])
        elif op != TOWER:
            yield from _op_cases(ops.SPECS[op], size, dtype, backend, device, label)
        else:
            yield tower_case(dtype, label, backend, device, "native", **TOWER_SIZES[size])


def _op_cases(spec: OpSpec, size: str, dtype: torch.dtype, backend: str, device: str, label: str) -> Iterator[Case]:
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value
              for name, value in spec.inputs(sizes_of(spec.name)[size], dtype).items()}
    exact_inputs = in_float64(inputs)
    for direction in ("fwd", "bwd"):
        if not refusals(spec, backend, inputs, direction):
            call, exactly = (_function(spec, direction, server, values)
                             for server, values in ((backend, inputs), ("torch", exact_inputs)))
            yield Case(f"{label} {direction}", call, exactly, dtype, spec.tolerance, direction == "bwd")


def _function(spec: OpSpec, direction: str, backend: str, inputs: dict[str, Any]) -> Callable[[], Sequence[Tensor]]:
    """The backend's own function on these inputs: what a tuner measures is not the boundary in front of it."""
    values = arguments(spec, inputs)
    serve = backends.choose(spec.name, direction, backend, values)
    if direction == "fwd":
        return lambda: [serve(*values)]
    y = backends.choose(spec.name, "fwd", backend, values)(*values)
    grad = Draw(1, y.dtype)(*y.shape).to(y.device)
    needs = [t.dtype.is_floating_point for t in values if isinstance(t, Tensor)]
    return lambda: [g for g, needed in zip(serve(grad, *values, needs=needs), needs, strict=False)
                    if needed and g is not None]


def tower_case(dtype: torch.dtype, label: str, server: str, device: str, products: str, *, dim: int, clips: int,
               frames: int, patches: int) -> Case:
    def tower(precision: torch.dtype, backend: str, products: str) -> Callable[[], Sequence[Tensor]]:
        module = STAB(dim, dtype=precision, device=device).eval()
        module.load_state_dict(seeded_tower(dim).state_dict())
        module.backend, module.products = backend, products
        pixels = Draw(0, precision)(clips, frames, 3, patches * PATCH, patches * PATCH).to(device)
        return partial(_tokens, module, pixels, Rectangles.full(clips * frames, patches, patches, device=device))

    def exactly() -> Sequence[Tensor]:
        return tower(torch.float64, "torch", "native")()

    return Case(f"{label} fwd", tower(dtype, server, products), exactly, dtype, Tolerance(), False)


def _tokens(tower: STAB, pixels: Tensor, rectangles: Rectangles) -> Sequence[Tensor]:
    return [tower(pixels, rectangles).tokens]


def fp8_case(dtype: torch.dtype, label: str, device: str, *, tokens: tuple[int, int], bottleneck: tuple[int, int],
             hidden: tuple[int, int]) -> Case:
    """Every quantisation of the modules in one call."""
    inputs = [Draw(0, dtype)(*shape).to(device) for shape in (tokens, bottleneck, hidden)]

    def call() -> Sequence[Tensor]:
        found = [fp8.quantise(x, gelu=x is inputs[2]) for x in inputs]
        return [rows.values[:, :x.shape[1]].float() * rows.scales for rows, x in zip(found, inputs, strict=True)]

    def exactly() -> Sequence[Tensor]:
        return [F.gelu(x.double()) if x is inputs[2] else x.double() for x in inputs]

    return Case(label, call, exactly, dtype, Tolerance(), False)
