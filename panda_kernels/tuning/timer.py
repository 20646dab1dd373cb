"""The timer of the benchmarks and of the tuner: calls in turns, so that whatever else the machine does meets them all
alike."""
from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

import torch

Call = Callable[[], object]


def finished(call: Call) -> None:
    """``call``, and what it started on a GPU."""
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(call: Call) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    finished(call)
    return time.perf_counter() - start


def rounds_for(calls: Iterable[Call], seconds: float, least: int = 3) -> int:
    """Warms up, and says how often all calls fit into ``seconds``: at least ``least`` times, at most 100."""
    calls = list(calls)
    once = sum(timed(call) for call in calls)
    if once < seconds / 4:  # a long first pass cannot be afforded twice
        once = sum(timed(call) for call in calls)
    return min(max(least, round(seconds / once)), 100)


def interleaved(calls: Mapping[str, Call], seconds: float, least: int = 3) -> dict[str, list[float]]:
    """Seconds of each call in each round, every other round in reverse order: no call always follows the same one."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for _ in range(rounds_for(calls.values(), seconds, least)):
        for name in names:
            samples[name].append(timed(calls[name]))
        names.reverse()
    return samples
