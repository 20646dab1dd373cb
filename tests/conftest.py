"""Paths and shared fixtures: tests run in a checkout, with or without the package installed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Kernels then run in Triton's interpreter, on CPU tensors. Triton reads it when it is first imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# No settings that someone measured on this machine: the heuristics are what is tested.
os.environ["PANDA_KERNELS_CACHE"] = str(Path(__file__).parent / "no_cache")

LEFT_OUT = pytest.StashKey[int]()
TESTS = Path(__file__).resolve().parent
for path in (TESTS, TESTS.parent):
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))


@pytest.fixture(scope="session")
def golden_weights() -> dict[str, torch.Tensor]:
    """The golden cases' weights by released name, float32 (``num_batches_tracked`` int64). Copy before changing."""
    from golden import weights

    return {name: torch.from_numpy(array) for name, array in weights.state_dict().items()}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` are left out where there is no GPU; the summary says how many."""
    if torch.cuda.is_available():
        return
    left_out = [item for item in items if item.get_closest_marker("gpu")]
    items[:] = [item for item in items if not item.get_closest_marker("gpu")]
    config.stash[LEFT_OUT] = len(left_out)
    config.hook.pytest_deselected(items=left_out)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    terminalreporter.write_line(f"gpu tests left out for want of a GPU: {config.stash.get(LEFT_OUT, 0)}")
