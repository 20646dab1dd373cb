"""One contest: peers and kernel timed in turns, so that whatever else the machine does meets them all alike."""
from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from panda_kernels.spec import Cost
from panda_kernels.tuning.timer import Call, Clock, clock_of, finished, interleaved, wall_clock

from .machine import Peaks
from .records import OURS, Row


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
    """Measures contests into rows. ``facts`` are the fields of a row that say where it was measured."""

    facts: Mapping[str, Any]
    peaks: Peaks
    seconds: float
    rows: list[Row] = field(default_factory=list)

    def row(self, labels: Mapping[str, str], ours: Call, peers: Mapping[str, Call], check: Callable[[], Errors],
            cost: Cost, *, overheads: Mapping[str, float] | None = None,
            scales: Mapping[str, tuple[float, str]] | None = None) -> None:
        """Time ``ours`` and ``peers`` for about ``seconds``, at least 3 rounds, after a first call of each.

        ``labels`` name the row. ``overheads`` are by contender, and so are ``scales``: a factor by which the times of
        a call on less than the whole input are multiplied, and the words that say so. Peers named after the reference
        are given its error.

        Raises:
            WrongResult: if ``check`` finds errors out of tolerance; ours has then run once, and nothing is recorded.
        """
        timer = clock_of(self.facts["device_type"])
        with torch.inference_mode():
            first = {OURS: timer(ours)}
        errors = check()
        if not errors.ours <= errors.limit:
            raise WrongResult(f"{' '.join(labels.values())}: relative error {errors.ours:.2e} against float64, "
                              f"limit {errors.limit:.2e}; not timed")
        with torch.inference_mode():
            first |= {name: timer(call) for name, call in peers.items()}
            samples = self._interleave({**peers, OURS: ours}, sum(first.values()), timer)
        where = {**self.facts, **labels}
        for name in (OURS, *peers):
            scale, note = (scales or {}).get(name, (1.0, ""))
            row = summary([scale * sample for sample in samples[name]], **where, contender=name, metric="seconds",
                          bytes=cost.bytes, flops=cost.flops, first_call_seconds=first[name],
                          overhead_seconds=(overheads or {}).get(name), note=note)
            if name == OURS:
                row = self._against_peak(replace(row, error=errors.ours, error_limit=errors.limit))
            elif name.startswith("reference"):
                row = replace(row, error=errors.reference)
            self.rows.append(row)

    def value(self, labels: Mapping[str, str], metric: str, values: Mapping[str, float | Sequence[float]],
              note: str = "") -> None:
        """Rows of something other than time, such as bytes, found once or a few times, for each contender."""
        for name, found in values.items():
            samples = found if isinstance(found, Sequence) else [found]
            where = {**self.facts, **labels}
            self.rows.append(summary(samples, **where, contender=name, metric=metric, note=note))

    def _against_peak(self, row: Row) -> Row:
        if not row.bytes:
            return row
        least = self.peaks.least_seconds(row.bytes, row.flops, row.dtype)
        return replace(row, gb_s=row.bytes / row.median / 1e9, gflop_s=row.flops / row.median / 1e9,
                       fraction_of_peak=least / row.median)

    def _interleave(self, calls: Mapping[str, Call], first: float, timer: Clock) -> dict[str, list[float]]:
        if first < self.seconds / 4:  # the first calls also warmed up; long ones cannot be afforded twice
            for call in calls.values():
                timer(call)
        return interleaved(calls, self.seconds, timer)


def summary(samples: Sequence[float], **fields: Any) -> Row:
    median = statistics.median(samples)
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else [median] * 3
    return Row(median=median, min=min(samples), max=max(samples), rounds=len(samples),
               spread=(high - low) / median if median else 0.0, **fields)


def overhead(call: Call, calls: int = 30) -> float:
    """Median seconds until ``call``, on the smallest input, returns; a GPU is not waited for."""
    for _ in range(3):
        finished(call)
    with torch.inference_mode():
        return statistics.median(wall_clock(call) for _ in range(calls))
