"""How a call finds its setting, in microseconds: what this process found before, else files, else the heuristic."""
from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import identity, store
from .space import Point, Space, Value
from .store import Entry

C = TypeVar("C")
FARTHEST = 2.0  # powers of two between two shapes, over all their sizes: beyond, the heuristic knows better
_DEVICES = {"cpu": "cpu", "triton": "cuda"}
_found: dict[tuple[Any, ...], dict[str, int] | None] = {}


def choose(space: Space, heuristic: C, like: Tensor, **shape: Value) -> C:
    """The config for a call on the device and in the dtype of ``like``: measured, or ``heuristic``.

    ``shape`` says what the config depends on, never a number of tokens, frames or clips. The nearest measured shape
    serves too: by the logarithms of its integers, where all else is equal.
    """
    if _session is not None:
        return _session.choose(space, heuristic, like, shape)
    key = (space, like.device, torch.get_num_threads(), like.dtype, *shape.values())
    try:
        fields = _found[key]
    except KeyError:
        fields = _found[key] = _look_up(point_of(space, like, shape))
    return heuristic if fields is None else replace(heuristic, **fields)  # type: ignore[type-var]


def point_of(space: Space, like: Tensor, shape: Mapping[str, Value]) -> Point:
    return Point(space, str(like.device), str(like.dtype).removeprefix("torch."), tuple(shape.items()))


def _look_up(point: Point) -> dict[str, int] | None:
    space, device, dtype, shape = point
    if torch.device(device).type != _DEVICES[space.backend]:  # such as meta tensors, or Triton's interpreter
        return None
    for entries in _entries(space.backend, device, torch.get_num_threads()):
        usable = [e for e in entries.get(space.name, ()) if e.dtype == dtype and space.holds(e.config)]
        nearest = min(usable, key=lambda e: distance(dict(shape), e.shape), default=None)
        if nearest and distance(dict(shape), nearest.shape) <= FARTHEST:
            return nearest.config
    return None


def distance(a: Mapping[str, Value], b: Mapping[str, Value]) -> float:
    """Powers of two between two shapes, summed over their sizes; infinite where they differ in anything else."""
    if a.keys() != b.keys():
        return math.inf
    total = 0.0
    for name, value in a.items():
        other = b[name]
        if type(value) is int and type(other) is int and value > 0 and other > 0:
            total += abs(math.log2(value / other))
        elif value != other:
            return math.inf
    return total


@functools.cache
def _entries(backend: str, device: str, threads: int) -> tuple[dict[str, list[Entry]], ...]:
    """What holds here, by kernel: of the user's cache, then of the shipped file, whose versions need not be these."""
    here = identity.device_of(backend, device)
    versions = identity.versions(backend)
    file = store.file_of(store.cache_folder(), str(here["name"]))
    of_device = [e for e in store.load(file) if e.device == here]
    own = [e for e in of_device if e.versions == versions and _is_of_this_kernel(e)]
    if of_device and not own:
        store.warn_once(file, "was measured with other versions and is ignored; `panda-kernels autotune` renews it")
    shipped = store.load(store.file_of(store.SHIPPED, str(here["name"])))
    return _by_kernel(own), _by_kernel([e for e in shipped if e.device == here and _is_of_this_kernel(e)])


def _is_of_this_kernel(entry: Entry) -> bool:
    try:
        return identity.content(entry.kernel) == entry.content
    except (OSError, ValueError):  # a kernel that is no more
        return False


def _by_kernel(entries: list[Entry]) -> dict[str, list[Entry]]:
    kernels: dict[str, list[Entry]] = {}
    for entry in sorted(entries, key=Entry.key):
        kernels.setdefault(entry.kernel, []).append(entry)
    return kernels


def in_use(backend: str, device: str) -> list[int]:
    """How many settings hold on a device: of the user's cache, and of the file shipped for it."""
    return [sum(map(len, kernels.values())) for kernels in _entries(backend, device, torch.get_num_threads())]


def forget() -> None:
    """Files are read again at the next call."""
    _found.clear()
    _entries.cache_clear()


@dataclass
class Session:
    """While a tuner runs, calls take the configs it wants to see, else their heuristic's, and are noted down."""

    seen: dict[Point, Any] = field(default_factory=dict)
    wanted: dict[Point, Any] = field(default_factory=dict)

    def choose(self, space: Space, heuristic: Any, like: Tensor, shape: Mapping[str, Value]) -> Any:
        point = point_of(space, like, shape)
        self.seen.setdefault(point, heuristic)
        wanted = self.wanted.get(point)
        return heuristic if wanted is None else replace(heuristic, **space.fields(wanted))


_session: Session | None = None


@contextmanager
def observed() -> Iterator[Session]:
    """Calls of this process ask a session instead of the files."""
    global _session
    _session = Session()
    try:
        yield _session
    finally:
        _session = None
