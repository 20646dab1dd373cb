"""One row: peers and kernel timed in turns, so that whatever else the machine does meets them all alike."""
from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from panda_kernels.spec import Cost
from panda_kernels.tuning.timer import Call, finished, rounds_for, timed

from .machine import Peaks


@dataclass(frozen=True)
class Errors:
    """Relative errors against float64 of the kernel and of the reference in the same dtype, and the kernel's limit."""

    ours: float
    reference: float
    limit: float


class WrongResult(AssertionError):
    """The kernel's output is out of tolerance; its speed would mean nothing."""


@dataclass(frozen=True)
class Bench:
    """Measures rows into pytest-benchmark's records: ours is its timed function, the rest goes to ``extra_info``."""

    fixture: Any
    facts: Mapping[str, Any]
    peaks: Peaks
    seconds: float

    def row(self, labels: Mapping[str, str], ours: Call, peers: Mapping[str, Call], errors: Errors, cost: Cost) -> None:
        """Time ``ours`` and ``peers`` for about ``seconds``, at least 3 rounds. ``labels`` name the row.

        Raises:
            WrongResult: before anything is timed, if ``errors`` are out of tolerance.
        """
        if not errors.ours <= errors.limit:
            raise WrongResult(f"{' '.join(labels.values())}: relative error {errors.ours:.2e} against float64, "
                              f"limit {errors.limit:.2e}; not timed")
        with torch.inference_mode():
            samples = self._interleave(partial(finished, ours), peers)
        info = self.fixture.extra_info
        info.update(self.facts, **labels, bytes=cost.bytes, flops=cost.flops, error=errors.ours,
                    reference_error=errors.reference, error_limit=errors.limit)
        if self.fixture.disabled:
            return
        ours_seconds = self.fixture.stats.stats
        median = ours_seconds.median
        least = self.peaks.least_seconds(cost.bytes, cost.flops, labels["dtype"])
        info.update(
            gb_s=cost.bytes / median / 1e9,
            gflop_s=cost.flops / median / 1e9,
            fraction_of_peak=least / median,
            spread=(ours_seconds.q3 - ours_seconds.q1) / median,
            peers={name: _summary(seconds, median) for name, seconds in samples.items()},
        )

    def memory_row(self, labels: Mapping[str, str], ours: Callable[[], int], reference: Callable[[], int]) -> None:
        """Record bytes instead of times; the recorded time is that of the process that measured ours."""
        peaks = {"reference_peak_bytes": reference(), "peak_bytes": self.fixture.pedantic(ours)}
        self.fixture.extra_info.update(self.facts, **labels, **peaks)

    def _interleave(self, ours: Call, peers: Mapping[str, Call]) -> dict[str, list[float]]:
        rounds = rounds_for((*peers.values(), ours), self.seconds)
        samples: dict[str, list[float]] = {name: [] for name in peers}

        def time_peers() -> None:
            for name, call in peers.items():
                samples[name].append(timed(call))

        self.fixture.pedantic(ours, setup=time_peers, rounds=rounds)
        return samples


def _summary(seconds: list[float], ours: float) -> dict[str, float]:
    median = statistics.median(seconds)
    return {"median": median, "min": min(seconds), "max": max(seconds), "speedup": median / ours}
