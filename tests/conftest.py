"""Paths and shared fixtures: tests run in a checkout, with or without the package installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent
for path in (TESTS, TESTS.parent):
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))


@pytest.fixture(scope="session")
def golden_weights() -> dict[str, torch.Tensor]:
    """The golden cases' weights by released name, float32 (``num_batches_tracked`` int64). Copy before changing."""
    from golden import weights

    return {name: torch.from_numpy(array) for name, array in weights.state_dict().items()}
