"""The rows of a run as lines of text."""
from __future__ import annotations

from collections.abc import Iterator, Sequence

from .machine import Peaks
from .records import OURS, Contest, Row, contests, speedups

UNSTEADY = 0.2
HEADER = ("row", "size", "dtype", "backend", "ours ms", "first", "overhead", "peers ms (times ours)", "% of peak",
          "error", "reference's")


def render(rows: Sequence[Row]) -> Iterator[str]:
    """Machine, a line a contest, and what is not a time."""
    where, peaks = rows[0], Peaks.of(rows)
    rates = ", ".join(f"{dtype} {rate:.0f} GFLOP/s" for dtype, rate in peaks.gflop_s.items())
    yield (f"{where.device}, {where.threads} threads, {where.isa}, torch {where.torch}, "
           f"load before {where.load_before:.1f}")
    yield (f"peaks: {rates}; copy {peaks.memory_gb_s:.0f} GB/s, in cache {peaks.l3_gb_s:.0f}. Commit "
           f"{where.commit[:9]}{' with changes' if where.dirty else ''}")
    timed = contests(rows)
    if timed:
        yield from aligned([HEADER, *(_cells(labels, contest) for labels, contest in timed.items())])
    if any(_unsteady(row) for contest in timed.values() for row in contest.values()):
        yield "~ the middle half of the rounds differ by more than a fifth: something else was running"
    yield from dict.fromkeys(f"{row.contender}: {row.note}" for row in rows if row.note)
    for labels, contest in contests(rows, "peak_bytes").items():
        peers = ", ".join(f"{name} {row.median / 2**20:.0f} MiB ({ratio:.1f} times)" for (name, ratio), row in
                          zip(speedups(contest).items(), (r for n, r in contest.items() if n != OURS), strict=True))
        yield f"{', '.join(labels)}: {contest[OURS].median / 2**20:.0f} MiB above the weights, {peers}"


def _unsteady(row: Row) -> bool:
    return row.spread is not None and row.spread > UNSTEADY


def _cells(labels: tuple[str, str, str], contest: Contest) -> tuple[str, ...]:
    ours, reference = contest[OURS], next((r for n, r in contest.items() if n.startswith("reference")), None)
    peers = ", ".join(f"{name} {1e3 * contest[name].median:.3g} ({ratio:.2f}x)"
                      for name, ratio in speedups(contest).items())
    return (*labels, ours.backend, f"{1e3 * ours.median:.3g}{' ~' if _unsteady(ours) else ''}",
            _number(ours.first_call_seconds, 1e3, ".3g"), _number(ours.overhead_seconds, 1e3, ".2g"), peers,
            _number(ours.fraction_of_peak, 100, ".0f"), _number(ours.error, 1, ".1e"),
            _number(reference.error if reference else None, 1, ".1e"))


def _number(value: float | None, scale: float, form: str) -> str:
    return "" if value is None else f"{scale * value:{form}}"


def aligned(lines: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
