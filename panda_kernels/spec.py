"""What an op is, in one object that its tests, benchmarks and documentation all read.

This module imports nothing of the package, so that every room may import it.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Cost:
    """The least a call must do: bytes read and written once, and arithmetic operations (a multiply-add is two)."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Tolerance:
    """How far a backend may be from float64: a multiple of torch's own error in that dtype, above a rounding floor.

    The floor is one rounding of the result, without which a case that torch happens to compute exactly would
    demand exactness of everyone.
    """

    forward: float = 2.0
    backward: float = 3.0

    def limit(self, torch_error: float, dtype: torch.dtype, *, backward: bool = False) -> float:
        return (self.backward if backward else self.forward) * torch_error + torch.finfo(dtype).eps / 2


@dataclass(frozen=True, kw_only=True)
class OpSpec:
    """One op.

    ``schema`` is its torch signature without the name and without the trailing ``str backend``; every gradient has
    the shape of its input. ``example`` builds the arguments of a call, by name, from the sizes of one entry of
    ``test_sizes``, ``bench_sizes`` or ``compile_sizes``. ``cost`` takes the same arguments. ``compile_sizes`` are what
    docs/kernel_resources.md covers beside the benchmarks: the other released widths, and calls that select other
    kernels. Only shapes that kernels are compiled for matter there, so that they are small.
    """

    name: str
    schema: str
    source: str
    reference: str
    example: Callable[..., Inputs]
    cost: Callable[..., Cost]
    test_sizes: Mapping[str, Mapping[str, Any]]
    bench_sizes: Mapping[str, Mapping[str, Any]]
    compile_sizes: Mapping[str, Mapping[str, Any]]
    tolerance: Tolerance = field(default_factory=Tolerance)

    def load_reference(self) -> Callable[..., torch.Tensor]:
        """The plain-torch definition, with the op's own arguments."""
        module, _, function = self.reference.partition(":")
        return getattr(import_module(module), function)

    def inputs(self, sizes: Mapping[str, Any], dtype: torch.dtype, *, seed: int = 0) -> Inputs:
        """Arguments of one call on the CPU; the same numbers in every dtype, up to rounding."""
        return self.example(Draw(seed, dtype), **sizes)


class Draw:
    """Seeded standard-normal tensors of one dtype, drawn in float64 so that every dtype gets the same numbers."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def __call__(self, *shape: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
        # Rounded to bfloat16 first: the float64 reference must see the very numbers the kernel sees.
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale + shift
        return x.to(torch.bfloat16).to(self.dtype)


def tensor_bytes(*tensors: torch.Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def relative_error(result: torch.Tensor, exact: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of ``exact``; infinite if anything is not finite."""
    result, exact = result.detach().double(), exact.detach().double()
    difference = result - exact
    if not bool(torch.isfinite(difference).all()):
        return float("inf")
    return float(difference.norm() / exact.norm().clamp_min(1e-300))
