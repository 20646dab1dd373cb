"""The rows of a run as lines of text, from what their ``extra_info`` holds."""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
UNSTEADY = 0.2
HEADER = ("row", "size", "dtype", "backend", "ours ms", "peers ms (times ours)", "% of peak", "error", "reference's")


def render(rows: Sequence[Row], facts: Mapping[str, Any]) -> Iterator[str]:
    """Machine, a line a row, and the peak memory; ``seconds`` of a row is the median of ours."""
    peaks = facts["peaks"]
    rates = ", ".join(f"{dtype} {rate:.0f} GFLOP/s" for dtype, rate in peaks["gflop_s"].items())
    yield (f"{facts['device']}, {facts['threads']} threads, {facts['isa']}, torch {facts['versions']['torch']}, "
           f"load before {facts['load_before']:.1f}")
    yield (f"peaks: {rates}; copy {peaks['memory_gb_s']:.0f} GB/s, in L3 {peaks['l3_gb_s']:.0f}. Commit "
           f"{facts['commit'][:9]}{' with changes' if facts['dirty'] else ''}")
    yield from _aligned([HEADER, *(_cells(row) for row in rows if "peers" in row)])
    if any(row.get("spread", 0) > UNSTEADY for row in rows):
        yield "~ the middle half of the rounds differ by more than a fifth: something else was running"
    for row in rows:
        if "peak_bytes" in row:
            ours, reference = row["peak_bytes"], row["reference_peak_bytes"]
            yield (f"{row['op']}, {row['size']}, {row['dtype']}: {ours / 2**20:.0f} MiB above the weights, "
                   f"reference {reference / 2**20:.0f} MiB ({reference / ours:.1f} times)")


def _cells(row: Row) -> tuple[str, ...]:
    peers = ", ".join(f"{name} {1e3 * p['median']:.3g} ({p['speedup']:.2f}x)" for name, p in row["peers"].items())
    ours = f"{1e3 * row['seconds']:.3g}{' ~' if row['spread'] > UNSTEADY else ''}"
    return (row["op"], row["size"], row["dtype"], row["backend"], ours, peers,
            f"{100 * row['fraction_of_peak']:.0f}", f"{row['error']:.1e}", f"{row['reference_error']:.1e}")


def _aligned(lines: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
