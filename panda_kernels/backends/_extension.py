"""The compiled extensions beside the package, and what their build left behind."""
from __future__ import annotations

import json
from pathlib import Path

import torch

PACKAGE = Path(__file__).parents[1]


def build_info() -> dict[str, str]:
    """What the build left behind: the compiler and torch it used, or under ``error`` why there is no extension.

    What concerns the CUDA extension begins with ``cuda_``.
    """
    file = PACKAGE / "_build.json"
    return json.loads(file.read_text()) if file.exists() else {}


def load(name: str, title: str, error: str) -> str | None:
    """Load a library of torch ops; why it cannot be, or None. ``error`` names the reason in :func:`build_info`."""
    library = PACKAGE / name
    if not library.exists():
        return f"the {title} is missing: {build_info().get(error, 'it was never built')}"
    try:
        torch.ops.load_library(library)
    except (OSError, RuntimeError) as problem:
        return f"the {title} does not load under torch {torch.__version__}: {problem}"
    return None
