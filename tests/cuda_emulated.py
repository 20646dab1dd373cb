"""The CUDA backend on CPU tensors: csrc/cuda compiled by a C++ compiler with cuda_emulation.h, behind its own bindings.

The library is cached by the content of the sources. Importing this registers the ops ``panda_kernels_cuda``.
"""
from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
TORCH = Path(torch.__file__).parent
FLAGS = ["-std=c++20", "-O2", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-unused-parameter",
         "-DPANDA_KERNELS_EMULATED", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY",
         f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests'}", f"-I{TORCH / 'include'}",
         f"-I{TORCH / 'include' / 'torch' / 'csrc' / 'api' / 'include'}"]


def build() -> Path:
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    sources = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), ROOT / "csrc" / "cuda_bindings.cpp",
               *sorted((ROOT / "tests").glob("cuda_*.cpp"))]
    headers = [*sorted((ROOT / "csrc" / "cuda").glob("*.h")), ROOT / "csrc" / "expect.h",
               ROOT / "tests" / "cuda_emulation.h"]
    digest = hashlib.sha256(repr((compiler, FLAGS, torch.__version__)).encode())
    for file in (*sources, *headers):
        digest.update(file.name.encode() + file.read_bytes())
    folder = ROOT / "build" / "cuda_emulated" / digest.hexdigest()[:16]
    target = folder / "cuda_emulated.so"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> str:
        built = str(folder / f"{source.stem}.o")
        subprocess.run([*compiler, *FLAGS, "-x", "c++", "-c", str(source), "-o", built], check=True)
        return built

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    unfinished = folder / f"{os.getpid()}.so"  # renamed when whole, so that two builders cannot meet
    libraries = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
    subprocess.run([*compiler, "-shared", "-o", str(unfinished), *objects, *libraries], check=True)
    unfinished.rename(target)
    return target


_file = build()
torch.ops.load_library(_file)
library = ctypes.CDLL(str(_file))


@contextmanager
def threads_backwards() -> Iterator[None]:
    """Blocks and threads run in the other order: what is read before it is written shows in one of the two."""
    library.panda_emulate_backwards(1)
    try:
        yield
    finally:
        library.panda_emulate_backwards(0)
