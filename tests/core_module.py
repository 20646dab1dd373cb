"""Builds csrc/core and csrc/module.cpp into the Python module ``panda_core``, cached by the content of the sources.

It works on NumPy arrays; bfloat16 ones are uint16.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pybind11

Array = np.ndarray[Any, Any]

ROOT = Path(__file__).resolve().parent.parent
CORE = ROOT / "csrc" / "core"
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g1", "-O1"]
POISON = {"float32": np.float32(np.nan), "bfloat16": np.uint16(0x7FC1)}


def _load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(*, sanitize: bool = False, compiler: str | None = None) -> Path:
    """The module's shared object, compiled if its sources, flags or compiler changed.

    With ``sanitize`` it can only be imported by an interpreter that was started with libasan preloaded.
    """
    compiler = compiler or os.environ.get("CXX", "g++")
    sources = _load("core_sources", CORE / "sources.py")
    common = [*sources.COMMON, f"-I{ROOT / 'csrc'}"]
    instrumented = SANITIZE if sanitize else []  # the core alone: pybind11's templates would take half the build
    python = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    jobs = [sources.Job(ROOT / "csrc" / "module.cpp", "module", python),
            *(job._replace(flags=[*job.flags, *instrumented]) for job in sources.jobs(CORE))]

    version = subprocess.run([compiler, "--version"], check=True, capture_output=True).stdout
    digest = hashlib.sha256(version + repr((compiler, common, jobs)).encode())
    for file in sorted([*CORE.iterdir(), ROOT / "csrc" / "module.cpp"]):
        if file.is_file():
            digest.update(file.name.encode() + file.read_bytes())
    folder = ROOT / "build" / "core_module" / digest.hexdigest()[:16]
    target = folder / ("panda_core" + sysconfig.get_config_var("EXT_SUFFIX"))
    if target.exists():
        return target

    folder.mkdir(parents=True, exist_ok=True)
    objects = [str(folder / f"{job.name}.o") for job in jobs]

    def compile_one(index: int) -> None:
        job = jobs[index]
        subprocess.run([compiler, *common, *job.flags, "-c", str(job.source), "-o", objects[index]], check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, range(len(jobs))))
    unfinished = folder / f"{os.getpid()}.so"  # renamed when whole, so that two builders cannot meet
    link = [compiler, "-shared", "-pthread", *instrumented, *objects, "-o", str(unfinished)]
    subprocess.run(link, check=True)
    unfinished.rename(target)
    return target


def load(*, sanitize: bool = False) -> ModuleType:
    """Builds and imports the module."""
    return _load("panda_core", build(sanitize=sanitize))


def sanitized_environment() -> dict[str, str]:
    """For an interpreter that imports the sanitized module; empty where the compiler has no such libraries."""
    find = [os.environ.get("CXX", "g++"), "-print-file-name=libasan.so"]
    library = subprocess.run(find, check=True, capture_output=True, text=True).stdout.strip()
    added = {"PANDA_SANITIZE": "1", "LD_PRELOAD": library, "ASAN_OPTIONS": "detect_leaks=0"}
    return os.environ | added if Path(library).is_absolute() else {}


def supported_tiers(core: ModuleType) -> list[str]:
    """The tiers this machine can run, lowest first; the tier in use stays what it was."""
    before = core.tier_name()
    tiers = [name for name in ("portable", "avx2", "avx512", "avx512_bf16", "amx") if core.set_tier(name)]
    core.set_tier(before)
    return tiers


@contextmanager
def tier(core: ModuleType, name: str) -> Iterator[None]:
    """The core in one tier, and then again in the tier it was in."""
    before = core.tier_name()
    assert core.set_tier(name), f"this machine has no {name}"
    try:
        yield
    finally:
        core.set_tier(before)


def to_bfloat16(x: Array) -> Array:
    """Rounded to nearest even, as bit patterns; float64 is not rounded to float32 on the way, but cut to odd."""
    wide = np.asarray(x, np.float64)
    short = wide.astype(np.float32)
    bits = short.view(np.uint32).copy()
    too_far = np.abs(short.astype(np.float64)) > np.abs(wide)
    bits[too_far] -= 1
    bits[short != wide] |= 1
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(short), 0x7FC0, rounded).astype(np.uint16)


def stored(x: Array, dtype: str) -> Array:
    return to_bfloat16(x) if dtype == "bfloat16" else np.asarray(x, np.float32)


def widened(x: Array) -> Array:
    """The float32 values of bfloat16 bit patterns; float32 as it is."""
    return (x.astype(np.uint32) << 16).view(np.float32) if x.dtype == np.uint16 else x
