"""The timer of the benchmarks and of the tuner: calls in turns, so that whatever else the machine does meets them all
alike."""
from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping

import torch

Call = Callable[[], object]
Clock = Callable[[Call], float]


def finished(call: Call) -> None:
    """``call``, and what it started on a GPU."""
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def wall_clock(call: Call) -> float:
    """Seconds until ``call`` returns; a GPU is not waited for."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def gpu_clock(call: Call) -> float:
    """Seconds by the GPU's own clock, from a cache that holds none of the inputs.

    Emptying the cache keeps the GPU busy while the host prepares the call, so that launches are not counted unless they
    take longer than that: they are the overhead, which is apart.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _flush_buffer().zero_()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def clock_of(device_type: str) -> Clock:
    return gpu_clock if device_type == "cuda" else wall_clock


def interleaved(calls: Mapping[str, Call], seconds: float, clock: Clock, least: int = 3) -> dict[str, list[float]]:
    """Seconds of each call in each round: for about ``seconds`` in all, from ``least`` to 100 rounds, every other one
    in reverse order, so that no call always follows the same one. The caller warms up."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names, spent, rounds = list(calls), 0.0, 0
    while rounds < least or (spent < seconds and rounds < 100):
        for name in names:
            samples[name].append(clock(calls[name]))
            spent += samples[name][-1]
        names.reverse()
        rounds += 1
    return samples


@functools.cache
def _flush_buffer() -> torch.Tensor:
    return torch.empty(4 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.int8, device="cuda")
