"""Graphs of one function by the shapes of its inputs: recorded, kept, replayed and dropped."""
from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import Checks
from .cuda_graph import RECORDERS, CudaRecorder

Inputs = tuple[Tensor | None, ...]
Function = Callable[..., tuple[Tensor, ...]]
Constants = tuple[object, ...]


class _Graph(NamedTuple):
    """Reads ``inputs`` and writes ``outputs``, always the same memory."""

    inputs: Inputs
    outputs: tuple[Tensor, ...]
    replay: Callable[[], None]


class Graphs:
    """A function of tensors by graphs, one for each shape of its inputs, on devices that have graphs.

    A shape is recorded at its second call, unless as many others as are kept came first since the first: recording
    takes longer than many calls. The graph that was not used for longest goes when there are too many, and all go when
    the constants change. A shape that cannot be recorded is called as it is from then on, and a warning says why.

    Threads and streams may call at once: inputs are copied in and outputs out, under a lock and in turn on the device.
    Copies of this object, and pickled ones, begin empty.

    Args:
        limit: how many graphs are kept.
    """

    def __init__(self, limit: int) -> None:
        if limit < 0:
            Checks("Graphs").fail("limit", "0 or more", limit)
        self.limit = limit
        self._lock = threading.Lock()
        self._constants: Constants = ()
        self._recorder: CudaRecorder | None = None
        self._kept: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._seen: OrderedDict[Hashable, None] = OrderedDict()
        self._failed: set[Hashable] = set()

    def __reduce__(self) -> tuple[type[Graphs], tuple[int]]:
        return Graphs, (self.limit,)

    def call(self, function: Function, inputs: Inputs, constants: Callable[[], Constants],
             settings: Hashable) -> tuple[Tensor, ...]:
        """``function(*inputs)``, the same bits.

        Args:
            function: must not wait for the device, and follow from inputs, constants and settings alone.
            inputs: tensors on one device of :data:`RECORDERS`, of which no gradient is wanted, or None.
            constants: gives what the function reads besides its inputs, other objects as soon as that has changed.
            settings: what is no tensor and decides what the function does.
        """
        key = (settings, *(None if t is None else (t.shape, t.dtype, t.device) for t in inputs))
        with self._lock:
            now = constants()
            if self._recorder is None or not _same(now, self._constants):
                self._clear()
                device = next(t.device for t in inputs if t is not None)
                self._recorder, self._constants = RECORDERS[device.type](device), now
            # A turn without a graph as well: after it, what another stream has just computed of the weights is there.
            with self._recorder.turn():
                graph = self._kept.get(key)
                if graph is None and self._is_due(key):
                    graph = self._record(self._recorder, key, function, inputs, constants)
                if graph is not None:
                    self._kept.move_to_end(key)
                    return _replay(graph, inputs)
        return function(*inputs)

    def clear(self) -> None:
        """Drop every graph and its memory."""
        with self._lock:
            self._clear()

    def _clear(self) -> None:
        if self._recorder is not None and self._kept:
            self._recorder.finish()
        self._kept.clear()
        self._seen.clear()
        self._recorder, self._constants = None, ()

    def _is_due(self, key: Hashable) -> bool:
        """Whether to record now what is not kept."""
        if key in self._failed:
            return False
        if key in self._seen:
            del self._seen[key]
            return True
        self._seen[key] = None
        if len(self._seen) > self.limit:
            self._seen.popitem(last=False)
        return False

    def _record(self, recorder: CudaRecorder, key: Hashable, function: Function, inputs: Inputs,
                constants: Callable[[], Constants]) -> _Graph | None:
        """A graph that is kept from now on, or None where that did not work."""
        if len(self._kept) == self.limit:
            recorder.finish()
            self._kept.popitem(last=False)
        # What is made in inference mode could not be written to outside it.
        with torch.inference_mode(False), torch.no_grad():
            held = tuple(None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device).copy_(t)
                         for t in inputs)
            recorder.warm_up(lambda: function(*held))  # raises what the function raises
            try:
                replay, outputs = recorder.record(lambda: function(*held))
            except Exception as error:
                self._failed.add(key)
                shapes = ", ".join(str(list(t.shape)) for t in inputs if t is not None)
                warnings.warn(f"no graph can be recorded of inputs of shapes {shapes}, which are served without one: "
                              f"{type(error).__name__}: {error}", stacklevel=2)
                return None
        # If another thread has changed the weights meanwhile, nobody knows which of them were recorded.
        if not _same(constants(), self._constants):
            return None
        self._kept[key] = graph = _Graph(held, outputs, replay)
        return graph


def _replay(graph: _Graph, inputs: Inputs) -> tuple[Tensor, ...]:
    for held, given in zip(graph.inputs, inputs, strict=True):
        if held is not None and given is not None:
            held.copy_(given)
    graph.replay()
    return tuple(t.clone() for t in graph.outputs)


def _same(one: Constants, other: Constants) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))
