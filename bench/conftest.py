"""``pytest bench/``: speeds beside their peers in one run, short by default.

``--full`` takes every size and adds torch.compile, and on a CPU Table 3, the first token, scaling, and the dtypes whose
products torch has no instructions for there. ``--save`` keeps the rows in ``bench/results/results.jsonl`` or in the
file it names, from which ``python -m bench.report`` makes pictures and README's figures, and ``bench/compare.py``
compares two runs. No speed is asserted; a wrong result is not timed.
"""
from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import machine, records, table
from bench.half_products import peer_dtype
from bench.measure import Bench

BENCH = pytest.StashKey[Bench]()
LONG_ON_A_CPU = ("bench_encoders.py", "bench_first_token.py", "bench_scaling.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("panda_kernels benchmarks")
    group.addoption("--full", action="store_true", help="all sizes, more rounds, and torch.compile as a peer")
    group.addoption("--device", default="cpu", help="cpu (the default) or cuda")
    group.addoption("--save", nargs="?", const=str(records.STORE), metavar="FILE",
                    help="write the rows into FILE, by default bench/results/results.jsonl")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """A short run on a CPU has of these what it is asked for by name."""
    if config.getoption("full") or config.getoption("device") != "cpu" or collection_path.name not in LONG_ON_A_CPU:
        return None
    return None if any(collection_path.name in argument for argument in config.args) else True


@pytest.fixture(scope="session")
def bench(request: pytest.FixtureRequest) -> Bench:
    device = request.config.getoption("device")
    facts = machine.facts(device)
    peaks = machine.measure_peaks(device)
    found = Bench(facts, peaks, seconds=3.0 if request.config.getoption("full") else 0.6)
    found.rows.extend(peaks.rows(facts))
    request.config.stash[BENCH] = found
    return found


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("device")


@pytest.fixture
def full(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("full")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "dtype" in metafunc.fixturenames:
        device = metafunc.config.getoption("device")
        dtypes = [dtype for dtype in machine.row_dtypes(device)
                  if metafunc.config.getoption("full") or peer_dtype(dtype, device) == dtype]
        metafunc.parametrize("dtype", dtypes, ids=[str(dtype).removeprefix("torch.") for dtype in dtypes])


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    found = config.stash.get(BENCH, None)
    if found is None or all(row.op == "peak" for row in found.rows):
        return
    terminalreporter.section("panda_kernels")
    for line in table.render(found.rows):
        terminalreporter.write_line(line)
    skipped = (report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", []))
    for reason in dict.fromkeys(skipped):
        terminalreporter.write_line(f"not measured: {reason}")
    if not config.getoption("full"):
        terminalreporter.write_line("short run: --full has all sizes, torch.compile, which takes long to compile, and "
                                    "on a CPU Table 3, the first token, scaling, and bfloat16 without instructions")
    if path := config.getoption("save"):
        records.upsert(Path(path), found.rows)
        terminalreporter.write_line(f"saved: {path}")
