"""Blocks of every size go back to where they came from (csrc/core/scratch.cpp)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from core_module import CORE, ROOT


def test_blocks_return_to_where_they_came_from(tmp_path: Path) -> None:
    program = tmp_path / "core_scratch"
    sources = [str(ROOT / "tests" / "core_scratch.cpp"), str(CORE / "scratch.cpp")]
    subprocess.run([os.environ.get("CXX", "g++"), "-std=c++20", "-O1", f"-I{ROOT / 'csrc'}", *sources, "-o", program],
                   check=True)
    run = subprocess.run([program], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
