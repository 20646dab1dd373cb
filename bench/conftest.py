"""``pytest bench/``: speeds beside their peers in one run, short by default.

``--full`` takes every size and adds torch.compile; ``--save`` keeps the run in ``bench/results/`` and
``--benchmark-json FILE`` anywhere; ``bench/plot.py`` draws it. No speed is asserted; a wrong result is not timed.
"""
from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from bench import machine, table  # noqa: E402
from bench.measure import Bench  # noqa: E402

FACTS = pytest.StashKey[dict[str, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("panda_kernels benchmarks")
    group.addoption("--full", action="store_true", help="all sizes, more rounds, and torch.compile as a peer")
    group.addoption("--device", default="cpu", help="cpu (the default) or cuda")
    group.addoption("--save", action="store_true", help="write bench/results/DATE_COMMIT.json")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    config.option.benchmark_quiet = True  # its table knows no peers; ours is printed instead
    if config.getoption("save"):
        path = HERE / "results" / f"{time.strftime('%Y-%m-%d')}_{machine.commit()['commit'][:9]}.json"
        path.parent.mkdir(exist_ok=True)
        config.option.benchmark_json = str(path)


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    return config.stash.get(FACTS, {})  # instead of the host's name and other things nobody asked for


def pytest_benchmark_generate_commit_info() -> dict[str, Any]:
    return machine.commit()


@pytest.fixture(scope="session")
def run_facts(request: pytest.FixtureRequest) -> tuple[dict[str, Any], machine.Peaks]:
    device = request.config.getoption("device")
    peaks = machine.measure_peaks(device)
    request.config.stash[FACTS] = machine.facts(peaks, device)
    return request.config.stash[FACTS], peaks


@pytest.fixture
def bench(benchmark: Any, request: pytest.FixtureRequest, run_facts: tuple[dict[str, Any], machine.Peaks]) -> Bench:
    facts, peaks = run_facts
    return Bench(benchmark, facts, peaks, seconds=3.0 if request.config.getoption("full") else 0.6)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("device")


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    facts = config.stash.get(FACTS, None)
    rows = [{**row.extra_info, "seconds": row.stats.median}
            for row in config._benchmarksession.benchmarks if row.stats.data]  # a row that failed has none
    if facts is None or not rows:
        return
    terminalreporter.section("panda_kernels")
    for line in table.render(rows, facts):
        terminalreporter.write_line(line)
    if not config.getoption("full"):
        terminalreporter.write_line("short run: --full has all sizes, and torch.compile, which takes long to compile")
