"""One CUDA graph: the kernels of a function, recorded once and started again as a whole."""
from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")

# While one thread records, another's recording would have to wait for the device, which ends both.
_one_at_a_time = threading.Lock()


class CudaRecorder:
    """Records functions on one device, into memory that what it recorded shares; so replays go in turn.

    A function must not wait for the device. It finds its tensors at the same addresses at every replay: whoever
    records keeps its inputs and outputs, and what else it reads.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._last_turn = torch.cuda.Event()

    @staticmethod
    def is_recording() -> bool:
        """Whether someone records what the current stream is given."""
        return torch.cuda.is_current_stream_capturing()

    def warm_up(self, function: Callable[[], object]) -> None:
        """Run ``function`` once where it will be recorded: kernels are compiled and libraries made ready."""
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                function()
            current.wait_stream(self._stream)

    def record(self, function: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """What replays ``function`` on the then current stream, and its result, which holds nothing before that."""
        graph = torch.cuda.CUDAGraph()
        # The outer stream comes back even if the recording ends badly, which leaves torch's own inside.
        with _one_at_a_time, torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            # cuBLAS' workspaces belong to streams, which come out of a small pool: the graph gets its own, or a stream
            # that is this one under another name would write to it during a replay.
            torch._C._cuda_clearCublasWorkspaces()
            try:
                # Other threads may go on meanwhile, allocating and waiting as they like.
                with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                    result = function()
            except Exception as error:
                # The end of a recording that went wrong raises as well, and hides why.
                raise error.__context__ or error from None
            finally:
                torch._C._cuda_clearCublasWorkspaces()
        return graph.replay, result

    @contextmanager
    def turn(self) -> Iterator[None]:
        """On the current stream, after all that was started in earlier turns, on whichever stream."""
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._last_turn)
            try:
                yield
            finally:
                self._last_turn.record(stream)

    def finish(self) -> None:
        """Wait for the last turn, after which graphs and their memory can go."""
        self._last_turn.synchronize()


# By type of device; there are graphs on no other.
RECORDERS: dict[str, type[CudaRecorder]] = {"cuda": CudaRecorder}


def is_recording(device: torch.device) -> bool:
    """Whether the current stream of ``device`` notes work down instead of doing it."""
    recorder = RECORDERS.get(device.type)
    return recorder is not None and recorder.is_recording()
