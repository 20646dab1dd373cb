"""The one way a kernel is started, so that what is compiled ahead of time is what runs.

A kernel takes tensors, integers that change from call to call (named in ``do_not_specialize``, or each new size would
be compiled again) and constexprs: what the architecture fixes, such as C, and the fields of its config in capitals.
"""
from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Config:
    """What a heuristic chooses for one launch; an op adds its tile sizes."""

    threads: int = 128
    num_stages: int = 2


@dataclass(frozen=True)
class Launch:
    kernel: Any
    grid: int
    config: Config
    args: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.kernel.fn.__module__.rpartition('.')[2]}.{self.kernel.__name__}"

    def options(self, warp_size: int) -> dict[str, int]:
        return {"num_warps": self.config.threads // warp_size, "num_stages": self.config.num_stages}

    def __call__(self) -> None:
        tensor = next(a for a in self.args.values() if isinstance(a, Tensor))
        with torch.cuda.device_of(tensor):
            self.kernel[(self.grid,)](**self.args, **self.options(64 if torch.version.hip else 32))


# Triton's own take several microseconds on the host, as kernels call them too; a tower computes sixty grids.
def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


@functools.cache
def _tiles(config: Config) -> dict[str, Any]:
    return {name.upper(): value for name, value in vars(config).items() if name not in vars(Config())}


_record: list[Launch] | None = None


def launch(kernel: Any, grid: int, config: Config, **args: Any) -> None:
    """Start ``grid`` programs of ``kernel``; the config's fields are added to ``args`` in capitals."""
    started = Launch(kernel, grid, config, args | _tiles(config))
    if _record is None:
        started()
    else:
        _record.append(started)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Kernels are noted down instead of run, so that the op's tensors may be on the meta device."""
    global _record
    launches: list[Launch] = []
    _record = launches
    try:
        yield launches
    finally:
        _record = None
