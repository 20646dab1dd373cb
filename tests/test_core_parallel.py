"""Threads do each piece of work once, and what a thread that is held up leaves (csrc/core/parallel.cpp)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from core_module import CORE, ROOT


def test_threads_share_what_is_left(tmp_path: Path) -> None:
    program = tmp_path / "core_parallel"
    sources = [str(ROOT / "tests" / "core_parallel.cpp"), str(CORE / "parallel.cpp")]
    subprocess.run([os.environ.get("CXX", "g++"), "-std=c++20", "-O1", "-pthread", f"-I{ROOT / 'csrc'}", *sources, "-o",
                    program], check=True)
    run = subprocess.run([program], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
