"""Input checks whose errors name the op, the argument, what was expected and what came."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Checks:
    """Checks of one call of ``op``; each method returns nothing and raises on the first fault."""

    def __init__(self, op: str) -> None:
        self.op = op

    def fail(self, argument: str, expected: object, given: object, error: type[Exception] = ValueError) -> None:
        raise error(f"{self.op}: {argument}: expected {expected}, got {given}")

    def shape(self, argument: str, tensor: Tensor, expected: Sequence[int | str]) -> None:
        """``expected`` holds sizes, or names of sizes that are free."""
        given = tuple(tensor.shape)
        fits = len(given) == len(expected) and all(
            isinstance(e, str) or e == g for e, g in zip(expected, given, strict=True))
        if not fits:
            self.fail(argument, f"shape [{', '.join(map(str, expected))}]", f"[{', '.join(map(str, given))}]")

    def not_empty(self, argument: str, tensor: Tensor) -> None:
        if tensor.numel() == 0:
            self.fail(argument, "at least one element", f"an empty tensor of shape {list(tensor.shape)}")

    def floating(self, argument: str, tensor: Tensor, *, also: Sequence[torch.dtype] = ()) -> None:
        if not tensor.dtype.is_floating_point and tensor.dtype not in also:
            names = ["a floating dtype", *(str(d) for d in also)]
            self.fail(argument, " or ".join(names), tensor.dtype, TypeError)

    def same(self, **tensors: Tensor | None) -> None:
        """All tensors on the device and of the dtype of the first."""
        present = {name: t for name, t in tensors.items() if t is not None}
        first, leader = next(iter(present.items()))
        self.same_device(**present)
        for name, tensor in present.items():
            if tensor.dtype != leader.dtype:
                self.fail(name, f"{leader.dtype} as {first}", tensor.dtype, TypeError)

    def same_device(self, **tensors: Tensor | None) -> None:
        present = {name: t for name, t in tensors.items() if t is not None}
        first, leader = next(iter(present.items()))
        for name, tensor in present.items():
            if tensor.device != leader.device:
                self.fail(name, f"device {leader.device} as {first}", tensor.device)
