"""Two runs side by side: ``python bench/compare.py A B``, each a file of results or the beginning of a commit.

For each row of both, B's median over A's; below 1, B is faster or smaller. The noise of a row is half of both spreads
and, for rows of ours, by how much the row's reference, the same code in both runs, has changed meanwhile. ``*`` marks
what is beyond it.
"""
from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.records import OURS, STORE, Row, load, newest
from bench.table import aligned

Where = tuple[str, str, str, str, str, int, str]


@dataclass(frozen=True)
class Change:
    """One row in two runs. ``drift`` is the change of the row's reference, as a logarithm; 0 where there is none."""

    before: Row
    after: Row
    drift: float = 0.0

    @property
    def ratio(self) -> float:
        return self.after.median / self.before.median

    @property
    def noise(self) -> float:
        """Relative: a ratio within ``1 +- noise`` means nothing."""
        return ((self.before.spread or 0.0) + (self.after.spread or 0.0)) / 2 + abs(math.expm1(abs(self.drift)))

    @property
    def beyond_noise(self) -> bool:
        return max(self.ratio, 1 / self.ratio) > 1 + self.noise


def changes(before: Sequence[Row], after: Sequence[Row]) -> list[Change]:
    """Every row that both runs have; those of the machine's peaks too."""
    old, new = ({_where(row): row for row in rows} for rows in (before, after))
    plain = {where: Change(old[where], row) for where, row in new.items() if where in old and old[where].median}
    drifts = {change.after.contest: math.log(change.ratio) for change in plain.values()
              if change.after.metric == "seconds" and change.after.contender.startswith("reference")}
    return [Change(c.before, c.after, drifts.get(c.after.contest, 0.0))
            if (c.after.contender, c.after.metric) == (OURS, "seconds") else c for c in plain.values()]


def _where(row: Row) -> Where:
    return *row.contest, row.contender, row.metric, row.threads, row.malloc


def render(found: Sequence[Change]) -> Iterator[str]:
    first = found[0]
    if (first.before.device, first.before.isa) != (first.after.device, first.after.isa):
        yield (f"not one machine: {first.before.device}, {first.before.isa}, and {first.after.device}, "
               f"{first.after.isa}")
    lines = [("row", "size", "dtype", "contender", "metric", "A", "B", "B/A", "noise", "")]
    lines += [(*c.after.contest, c.after.contender, c.after.metric, f"{c.before.median:.4g}", f"{c.after.median:.4g}",
               f"{c.ratio:.3f}", f"{c.noise:.3f}", "*" if c.beyond_noise else "") for c in found]
    yield from aligned(lines)
    ours = [c for c in found if c.after.contender == OURS and c.beyond_noise]
    faster = sum(c.ratio < 1 for c in ours)
    yield f"of ours beyond the noise: {faster} better, {len(ours) - faster} worse"


def rows_of(name: str) -> list[Row]:
    """The rows of a file, or those of the newest run in the store of a commit that begins so.

    Raises:
        ValueError: there are none.
    """
    if Path(name).is_file():
        return load(Path(name))
    of_commit = [row for row in load(STORE) if row.commit.startswith(name)]
    if not of_commit:
        raise ValueError(f"compare: {name}: neither a file nor the beginning of a commit in {STORE}")
    return newest(of_commit, max(of_commit, key=lambda row: row.date).device_type)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", metavar="A")
    parser.add_argument("after", metavar="B")
    args = parser.parse_args(arguments)
    try:
        found = changes(rows_of(args.before), rows_of(args.after))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if not found:
        print("compare: the two runs have no row in common", file=sys.stderr)
        return 2
    print("\n".join(render(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
