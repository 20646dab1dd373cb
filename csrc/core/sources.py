"""How the files of this folder are compiled; setup.py and the tests build from this one list.

Each ``<op>_body.inc`` is compiled once a SIMD tier, with PANDA_TIER defined as its name. A ``.cpp`` whose name ends in
a tier's is compiled with that tier's instructions, every other one without any.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import NamedTuple

# Loops start a cache line: that of the products' register tile fills two and, where it met three, ran 5 % slower.
COMMON = ["-std=c++20", "-O3", "-falign-loops=64", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall",
          "-Wextra", "-Wno-psabi"]

_AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
_AVX512 = [*_AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")), "-mprefer-vector-width=512"]
_X86_TIERS = {
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512_bf16": [*_AVX512, "-mavx512bf16"],
    "amx": [*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
_BODY_TIERS = ("portable", "avx2", "avx512")


class Job(NamedTuple):
    """One object file: ``<compiler> <COMMON> <flags> -c <source> -o <name>.o``."""

    source: Path
    name: str
    flags: list[str]


def jobs(folder: Path, machine: str | None = None) -> list[Job]:
    """Every object file of the core for a machine (``platform.machine()``), in a fixed order."""
    tiers = _X86_TIERS if (machine or platform.machine()).lower() in ("x86_64", "amd64") else {}
    found = []
    for body in sorted(folder.glob("*_body.inc")):
        for tier in _BODY_TIERS:
            if tier == "portable" or tier in tiers:
                flags = [*tiers.get(tier, []), f"-DPANDA_TIER={tier}", "-x", "c++"]
                found.append(Job(body, f"{body.stem}_{tier}", flags))
    for file in sorted(folder.glob("*.cpp")):
        suffix = max((tier for tier in _X86_TIERS if file.stem.endswith("_" + tier)), key=len, default=None)
        if suffix is None or suffix in tiers:
            found.append(Job(file, file.stem, tiers.get(suffix or "", [])))
    return found
