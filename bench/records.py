"""Results in long form: one row a measurement, in JSON lines; measured again, a row takes the place of the old one."""
from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

OURS = "panda_kernels"
STORE = Path(__file__).resolve().parent / "results" / "results.jsonl"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A ``metric`` of a ``contender`` in a contest of ``op``, ``size`` and ``dtype``, and where it was measured.

    Attributes:
        metric: ``seconds``, ``peak_bytes``, ``packed_bytes``, ``parameters``, ``multiply_adds``, or for ``op="peak"``
            ``gb_s``, ``gflop_s`` and ``bytes``.
        median, min, max, rounds: of the samples; ``spread`` is the width of their middle half over the median.
        bytes, flops: the least that the call must move and do.
        fraction_of_peak: the roofline's time, from the peaks of the same run, over the median.
        error, error_limit: relative, against float64.
        first_call_seconds: compiling, tuning and packing of weights included; not among the samples.
        overhead_seconds: of the same call on the smallest input.
        note: what the number is of, where that is not plain, such as an extrapolation.
        malloc: the ``MALLOC_`` variables of the environment.
        load_before: the system's load average before the run.
    """

    op: str
    size: str
    dtype: str
    contender: str
    metric: str
    median: float
    min: float
    max: float
    rounds: int = 1
    spread: float | None = None
    bytes: int = 0
    flops: int = 0
    gb_s: float | None = None
    gflop_s: float | None = None
    fraction_of_peak: float | None = None
    error: float | None = None
    error_limit: float | None = None
    first_call_seconds: float | None = None
    overhead_seconds: float | None = None
    backend: str = ""
    note: str = ""
    device: str = ""
    device_type: str = "cpu"
    threads: int = 1
    isa: str = ""
    torch: str = ""
    numpy: str = ""
    python: str = ""
    panda_kernels: str = ""
    malloc: str = ""
    load_before: float = 0.0
    commit: str = "unknown"
    dirty: bool = True
    date: str = ""

    @property
    def contest(self) -> tuple[str, str, str]:
        return self.op, self.size, self.dtype

    @property
    def run(self) -> tuple[object, ...]:
        return self.commit, self.dirty, self.device, self.isa

    @property
    def key(self) -> tuple[object, ...]:
        return *self.run, self.threads, self.malloc, *self.contest, self.contender, self.metric


def load(path: Path) -> list[Row]:
    """The rows of a file.

    Raises:
        ValueError: a line is no row, or there is none.
    """
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            rows.append(Row(**json.loads(line)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}:{number}: expected a row of results: {error}") from None
    if not rows:
        raise ValueError(f"{path}: no rows")
    return rows


def upsert(path: Path, rows: Iterable[Row]) -> None:
    """Write ``rows`` into a file, made if missing; one with the key of an older row replaces it where it stands."""
    merged = {row.key: row for row in load(path)} if path.exists() else {}
    merged |= {row.key: row for row in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    partial.write_text("".join(f"{_line(row)}\n" for row in merged.values()))
    partial.replace(path)


def _line(row: Row) -> str:
    values = {field.name: getattr(row, field.name) for field in fields(row)}
    kept = {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in values.items()
            if name not in _DEFAULTS or value != _DEFAULTS[name]}
    return json.dumps(kept)


_DEFAULTS = {field.name: field.default for field in fields(Row) if field.default is not MISSING}


def newest(rows: Sequence[Row], device_type: str) -> list[Row]:
    """The rows of the run saved last on this type of device, ``cpu`` or ``cuda``; none if there is no run."""
    there = [row for row in rows if row.device_type == device_type]
    if not there:
        return []
    run = max(there, key=lambda row: row.date).run
    return [row for row in there if row.run == run]


def as_run(rows: Sequence[Row]) -> list[Row]:
    """Those on all threads with the system's own allocator: what a reader of a table or a picture expects."""
    threads = max((row.threads for row in rows), default=0)
    return [row for row in rows if row.threads == threads and not row.malloc]


Contest = dict[str, Row]


def contests(rows: Iterable[Row], metric: str = "seconds") -> dict[tuple[str, str, str], Contest]:
    """For each op, size and dtype the rows of one metric by contender; only contests that ours is in."""
    found: dict[tuple[str, str, str], Contest] = {}
    for row in rows:
        if row.metric == metric:
            found.setdefault(row.contest, {})[row.contender] = row
    return {labels: contest for labels, contest in found.items() if OURS in contest}


def speedups(contest: Contest) -> dict[str, float]:
    """Each peer's time over ours."""
    return {name: row.median / contest[OURS].median for name, row in contest.items() if name != OURS}
