"""What one inference on a GPU launches, counted on meta tensors: ``python -m bench.launches [--clips N] [--frames N]``.

Bytes are those of the tensors that a kernel is given, each once: what it must at least read and write.
"""
from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from panda_kernels.backends.triton import stab_tower, token_mlp
from panda_kernels.nn import STAB, Projector
from panda_kernels.nn.stab import prepared_by
from panda_kernels.rectangles import Rectangles
from panda_kernels.spec import tensor_bytes
from panda_kernels.triton._launch import Launch, recorded

from . import tower

SIDE, OUT = 32, 4096


@dataclass(frozen=True)
class Kernel:
    """Of torch, or of the library under it."""

    name: str
    args: dict[str, Any]
    grid: str = "-"


class _TorchKernels(TorchDispatchMode):
    """Notes down what computes: neither views nor allocations."""

    def __init__(self, found: list[Any]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and not func.name().startswith("aten::empty"):
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
            self.found.append(Kernel(str(func), dict(enumerate(tensors))))  # type: ignore[arg-type]
        return result


@contextmanager
def counted() -> Iterator[list[Launch | Kernel]]:
    """Kernels of Triton, which are not run, and of torch, in the order in which they would start."""
    with recorded() as found, _TorchKernels(found):
        yield found  # type: ignore[misc]


def of_inference(clips: int, frames: int, *, dim: int = tower.DIM, dtype: torch.dtype = torch.bfloat16,
                 pixels: torch.dtype = torch.uint8) -> tuple[list[Launch | Kernel], list[Launch | Kernel]]:
    """Of the tower on square frames, and of the projector."""
    module, last = STAB(dim, dtype=dtype, device="meta").eval(), Projector(dim, OUT, dtype=dtype, device="meta")
    with torch.no_grad():
        tower_weights = prepared_by(stab_tower, module)
    parts: Any = last
    mlp_weights = token_mlp.prepare(parts[0].weight, parts[0].bias, parts[2].weight, parts[2].bias)
    x = torch.empty(clips, frames, 3, SIDE * module.patch, SIDE * module.patch, dtype=pixels, device="meta")
    rectangles = Rectangles.full(clips * frames, SIDE, SIDE, module.window)
    rectangles = rectangles._replace(corners=rectangles.corners.to("meta"))
    tokens: list[Tensor] = []
    calls: tuple[Callable[[], object], ...] = (
        lambda: tokens.append(stab_tower.run(tower_weights, x, rectangles, None)[0]),
        lambda: token_mlp.run(mlp_weights, tokens[0]))
    results = []
    for call in calls:
        with torch.no_grad(), counted() as found:
            call()
        results.append(found)
    return results[0], results[1]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.launches", description=__doc__)
    parser.add_argument("--clips", type=int, default=2)
    parser.add_argument("--frames", type=int, default=4, help="of a clip; 1 for images")
    args = parser.parse_args()
    in_tower, in_projector = of_inference(args.clips, args.frames)
    print("| launch | kernel | programs | MB |\n|---|---|---|---|")
    for i, launch in enumerate([*in_tower, *in_projector], 1):
        num_bytes = tensor_bytes(*(t for t in launch.args.values() if isinstance(t, Tensor)))
        print(f"| {i} | `{launch.name}` | {launch.grid} | {num_bytes / 1e6:.1f} |")


if __name__ == "__main__":
    main()
